"""The parts of every comparison: make systems, count what they cost, score all in one pass.

Scores are those of ``accuracy.score_images``: all models see the same decoded images once.
"""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.resolve import model_of
from moee_analysis.models.loading import fingerprint
from moee_analysis.models.macs import MacCount, count_parameters, moe_macs
from moee_analysis.moe.expert_layer import macs_as_used
from moee_analysis.moe.layer import MoeMlp, all_mlps
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build

Variant = ExtractConfig | nn.Module
"""A configuration to extract, or a model made already."""


@dataclass(frozen=True)
class Made:
    """A system: the run or model it became, or the ``reason`` why there is none."""

    result: Extraction | nn.Module | None = None
    seconds: float = math.nan
    reason: str = ""

    @property
    def model(self) -> nn.Module | None:
        """The model, if there is one."""
        return None if self.result is None else model_of(self.result)


def make(build: Callable[[], Extraction | nn.Module]) -> Made:
    """Call ``build`` and time it; a MoeeError becomes the reason."""
    started = time.perf_counter()
    try:
        return Made(build(), time.perf_counter() - started)
    except MoeeError as error:
        return Made(None, time.perf_counter() - started, str(error))


def extract_all(
    dense: nn.Module, calibration: ImageSet, tried: Iterable[Variant], store: str | Path
) -> dict[Variant, Made]:
    """Extract every distinct configuration among ``tried``; models are made already.

    The seconds of an extraction are those it took when ``store`` was first asked for it.
    """
    distinct = dict.fromkeys(tried)
    configs = [each for each in distinct if isinstance(each, ExtractConfig)]
    made: dict[Variant, Made] = {each: Made(each) for each in distinct if each not in configs}
    facts = {"images": calibration.fingerprint, "model": fingerprint(dense)} if configs else {}
    for config in progress(configs, label="variants"):
        new = make(partial(extract, dense, calibration, config, store=store))
        name = f"seconds-{content_key(config=asdict(config), **facts)}"
        made[config] = replace(
            new, seconds=math.nan if new.reason else _first_seconds(store, name, new)
        )
    return made


def _first_seconds(store: str | Path, name: str, made: Made) -> float:
    """The seconds that the store has under this name; those of ``made``, if there are none yet."""
    file = "seconds.json"
    folder = get_or_build(Path(store), name, lambda new: write_json(new / file, made.seconds))
    return json.loads((folder / file).read_text())


def costs_of(
    model: nn.Module,
    dense: nn.Module,
    counted: MacCount,
    usage: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, float]:
    """MACs of one image and stored parameters of ``model``, and what it saves of the dense one's.

    ``usage`` is how much each expert is used, by layer; None takes the routing shares of the
    calibration. ``counted`` is of the dense model.
    """
    if usage is not None:
        macs = macs_as_used(model, usage)
    else:
        mlps = all_mlps(model).items()
        own = {name: m.macs_per_token() for name, m in mlps if isinstance(m, MoeMlp)}
        macs = moe_macs(model, own)
    parameters = count_parameters(model)
    return {
        "macs": float(macs),
        "macs_reduction": 1 - macs / counted.total,
        "params": parameters,
        "params_reduction": 1 - parameters / count_parameters(dense),
    }
