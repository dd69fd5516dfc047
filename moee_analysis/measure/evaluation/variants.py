"""Extractions side by side: several configurations, what they cost, all on the same images."""

import json
import math
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.accuracy import REFERENCE, Scores, score_images, summarize
from moee_analysis.measure.routing.bootstrap import MIDDLE, repeat
from moee_analysis.measure.routing.inputs import Run, model_of
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.loading import fingerprint
from moee_analysis.models.macs import MacCount, count, count_parameters
from moee_analysis.moe.layer import MoeMlp, Usage, all_mlps, macs_as_used
from moee_analysis.utils.checks import draw_numbers
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build

SCORES = ["top1", "low", "high", "retention", "retention_low", "retention_high", "agreement", "kl"]
DIVERGENCES = ["kl_low", "kl_high", "kl_change", "kl_change_low", "kl_change_high"]
COSTS = ["macs_reduction", "params_reduction", "router_macs", "seconds", "reason"]

Variant = ExtractConfig | nn.Module
"""A configuration to extract, or a model made already."""


@dataclass(frozen=True)
class Made:
    """A system: the run or model it became, or the ``reason`` why there is none."""

    result: Run | None = None
    seconds: float = math.nan
    reason: str = ""

    @property
    def model(self) -> nn.Module | None:
        """The model, if there is one."""
        return None if self.result is None else model_of(self.result)


def make(build: Callable[[], Run]) -> Made:
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
    made: dict[Variant, Made] = {each: Made(each) for each in tried}
    configs = [each for each in made if isinstance(each, ExtractConfig)]
    facts = {"images": calibration.fingerprint, "model": fingerprint(dense)} if configs else {}
    for config in progress(configs, label="variants"):
        new = make(partial(extract, dense, calibration, config, store=store))
        name = f"seconds-{content_key(config=asdict(config), **facts)}"
        seconds = math.nan if new.reason else _keep_seconds(Path(store), name, new.seconds)
        made[config] = replace(new, seconds=seconds)
    return made


def _keep_seconds(store: Path, name: str, own: float) -> float:
    """The seconds that the store has under this name: its ``own``, if there are none yet."""
    folder = get_or_build(store, name, lambda new: write_json(new / "seconds.json", own))
    return json.loads((folder / "seconds.json").read_text())


def costs_of(
    model: nn.Module, dense: nn.Module, counted: MacCount, usage: Usage | None = None
) -> dict[str, float]:
    """MACs of one image and stored parameters of ``model``, and what it saves of the dense one's.

    ``usage`` None takes the routing shares of the calibration; ``counted`` is of the dense model.
    """
    macs, parameters = macs_as_used(model, usage), count_parameters(model)
    return {
        "macs": float(macs),
        "macs_reduction": 1 - macs / counted.total,
        "params": parameters,
        "params_reduction": 1 - parameters / count_parameters(dense),
    }


def variants(
    dense: nn.Module,
    calibration: ImageSet,
    images: ImageSet,
    tried: Mapping[Hashable, Variant],
    *,
    store: str | Path,
    beside: Mapping[Hashable, Hashable] | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Extract every configuration, and evaluate all of them in one pass over the images.

    ``tried`` are configurations, or models made already that differ from the dense one in their
    MLPs, by the name of the variant; ``beside``, by the name of a variant, the name of the one that
    its KL divergence is compared with.

    A row per variant: ``variant``; ``top1``, ``low``, ``high``, ``retention``, ``retention_low``,
    ``retention_high``, ``agreement``, ``kl`` as in ``measure.accuracy``, beside the dense model;
    ``kl_low``, ``kl_high``, its 95 % bootstrap interval; ``kl_change``, how much larger it is than
    that of the variant ``beside`` it, with ``kl_change_low`` and ``kl_change_high`` (paired);
    ``macs_reduction``, ``params_reduction`` and ``router_macs``, shares of the dense model's, as
    the calibration is routed; ``seconds`` the extraction took when this store was first asked for
    it, without what that held already; ``reason`` why there is no model, and so no numbers.
    Raises MoeeError: no variants, no images, a variant to compare with that is not tried.
    """
    draw_numbers(seed, resamples=resamples)
    if not tried:
        raise MoeeError("at least one variant", "none", "name configurations or models to try")
    beside, place = beside or {}, {name: row for row, name in enumerate(tried)}
    unknown = [name for name in (*beside, *beside.values()) if name not in place]
    if unknown:
        expected, hint = f"variants among {', '.join(map(str, place))}", "compare with one of these"
        raise MoeeError(expected, f"'{unknown[0]}'", hint)
    made = extract_all(dense, calibration, tried.values(), store)
    rows = [made[each] for each in tried.values()]
    models = {place: row.model for place, row in enumerate(rows) if row.model is not None}
    table = pd.DataFrame({"variant": pd.Series(list(tried), dtype=object)})
    if models:
        scores = score_images(models, images, reference=dense)
        found = summarize(scores, seed=seed, resamples=resamples).set_index("system")
        names = {place[name]: place[other] for name, other in beside.items()}
        spread = _compare_divergences(scores, names, seed=seed, resamples=resamples)
        table = table.join(found[SCORES]).join(spread)
    counted = count(dense)
    costs = pd.DataFrame([_count_costs(row, dense, counted) for row in rows])
    table = table.join(costs).reindex(columns=["variant", *SCORES, *DIVERGENCES, *COSTS])
    return add_caption(
        table,
        f"{len(images)} images evaluated, reference: the dense model; bars are 95 % intervals of "
        "the image bootstrap; MACs with the routing shares of the calibration.",
    )


def _compare_divergences(
    scores: Mapping[int, Scores], beside: Mapping[int, int], *, seed: int, resamples: int
) -> pd.DataFrame:
    """Intervals of the KL divergence and of its changes, all on the same resampled images."""
    rows = [row for row in scores if row != REFERENCE]
    kl = np.stack([scores[row]["kl"] for row in rows], axis=1).astype(float)
    images = len(kl)
    draws = repeat(
        lambda rng: kl[rng.integers(images, size=images)].mean(axis=0), times=resamples, seed=seed
    )
    table = pd.DataFrame(index=rows, columns=DIVERGENCES, dtype=float)
    table["kl_low"], table["kl_high"] = np.quantile(draws, MIDDLE, axis=0)
    mean, drawn = pd.Series(kl.mean(axis=0), rows), pd.DataFrame(draws, columns=rows)
    for row, other in beside.items():
        if row in rows and other in rows:
            low, high = (drawn[row] - drawn[other]).quantile(MIDDLE)
            table.loc[row, DIVERGENCES[2:]] = mean[row] - mean[other], low, high
    return table


def _count_costs(row: Made, dense: nn.Module, counted: MacCount) -> dict[str, float | str]:
    facts = {"seconds": row.seconds, "reason": row.reason}
    if row.model is None:
        return facts
    mlps = all_mlps(row.model).items()
    routers = [counted.tokens[n] * m.router.macs for n, m in mlps if isinstance(m, MoeMlp)]
    costs = costs_of(row.model, dense, counted)
    return costs | {"router_macs": sum(routers) / counted.total} | facts
