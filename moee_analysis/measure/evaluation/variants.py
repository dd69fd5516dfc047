"""Extractions side by side: several configurations, all on the same images."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.pipeline import Extraction, extract
from moee_analysis.measure.evaluation.accuracy import REFERENCE, image_scores, summarised
from moee_analysis.measure.routing.bootstrap import repeat
from moee_analysis.models.loading import fingerprint
from moee_analysis.models.macs import MacCount, count, count_parameters, moe_macs
from moee_analysis.moe.layer import MoeMlp, all_mlps
from moee_analysis.utils.checks import draw_numbers
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, kept

Variant = ExtractConfig | nn.Module

SCORES = ["top1", "low", "high", "retention", "retention_low", "retention_high", "agreement", "kl"]
DIVERGENCES = ["kl_low", "kl_high", "kl_change", "kl_change_low", "kl_change_high"]


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

    Parameters
    ----------
    tried
        Configurations, or models made already that differ from the dense one in their MLPs, by
        the name of the variant.
    beside
        By the name of a variant, the name of the one that its KL divergence is compared with.
    seed, resamples
        Of the image bootstrap.

    Returns
    -------
    DataFrame
        A row per variant: ``variant``; ``top1``, ``low``, ``high``, ``retention``,
        ``retention_low``, ``retention_high``, ``agreement``, ``kl`` as in ``measure.accuracy``,
        with the dense model as reference; ``kl_low``, ``kl_high``, its 95 % bootstrap interval;
        ``kl_change``, how much larger it is than that of the variant ``beside`` it, with
        ``kl_change_low`` and ``kl_change_high`` (paired: both on the same resampled images);
        ``macs_reduction`` and ``params_reduction``, shares of the dense model's, with the routing
        shares of the calibration; ``router_macs``, what the routers cost, as such a share;
        ``seconds`` the extraction took with this store when it was first asked for here, what the
        store held already not counted; ``reason`` why there is no such model: then all numbers
        are NaN.

    Raises
    ------
    MoeeError
        No variants, no images, or a variant to compare with that is not among those tried.
    """
    draw_numbers(seed, resamples=resamples)
    names = _checked(tried, beside or {})
    made = made_of(dense, calibration, tried.values(), Path(store))
    rows = [made.get(each) or Made(model=each) for each in tried.values()]
    models = {place: row.model for place, row in enumerate(rows) if row.model is not None}
    table = pd.DataFrame({"variant": pd.Series(list(tried), dtype=object)})
    if models:
        scores = image_scores(models, images, reference=dense)
        found = summarised(scores, seed=seed, resamples=resamples).set_index("system")
        spread = _divergences(scores, names, seed=seed, resamples=resamples)
        table = table.join(found[SCORES]).join(spread)
    counted = count(dense)
    costs = pd.DataFrame([_cost(row, dense, counted) for row in rows])
    table = table.reindex(columns=["variant", *SCORES, *DIVERGENCES]).join(costs)
    table.attrs["caption"] = (
        f"{len(images)} images evaluated, reference: the dense model; bars are 95 % intervals of "
        "the image bootstrap; MACs with the routing shares of the calibration."
    )
    return table


def _checked(
    tried: Mapping[Hashable, Variant], beside: Mapping[Hashable, Hashable]
) -> dict[int, int]:
    """The rows of the variants to compare, and of those they are compared with."""
    if not tried:
        raise MoeeError("at least one variant", "none", "name configurations or models to try")
    place = {name: row for row, name in enumerate(tried)}
    unknown = [name for name in (*beside, *beside.values()) if name not in place]
    if unknown:
        raise MoeeError(
            f"variants among {', '.join(map(str, place))}", f"'{unknown[0]}'",
            "compare with one that is tried too",
        )  # fmt: skip
    return {place[name]: place[other] for name, other in beside.items()}


def _divergences(
    scores: Mapping[int, Mapping[str, np.ndarray]],
    beside: Mapping[int, int],
    *,
    seed: int,
    resamples: int,
) -> pd.DataFrame:
    """Intervals of the KL divergence and of its changes, all on the same resampled images."""
    rows = [row for row in scores if row != REFERENCE]
    kl = np.stack([scores[row]["kl"] for row in rows], axis=1).astype(float)
    draws = repeat(
        lambda chosen: kl[chosen].mean(axis=0),
        lambda rng: rng.integers(len(kl), size=len(kl)),
        times=resamples,
        seed=seed,
    )
    mean, drawn = kl.mean(axis=0), pd.DataFrame(draws, columns=rows)
    table = pd.DataFrame(index=rows, columns=DIVERGENCES, dtype=float)
    table["kl_low"], table["kl_high"] = np.quantile(draws, (0.025, 0.975), axis=0)
    for row, other in beside.items():
        if row in rows and other in rows:
            low, high = (drawn[row] - drawn[other]).quantile((0.025, 0.975))
            change = mean[rows.index(row)] - mean[rows.index(other)]
            table.loc[row, ["kl_change", "kl_change_low", "kl_change_high"]] = change, low, high
    return table


@dataclass(frozen=True)
class Made:
    """One variant: its model, or the ``reason`` why there is none, and the ``seconds`` it took."""

    model: nn.Module | None = None
    run: Extraction | None = None
    seconds: float = math.nan
    reason: str = ""


def made_of(
    dense: nn.Module, calibration: ImageSet, tried: Iterable[Variant], store: Path
) -> dict[Variant, Made]:
    """Every distinct configuration among ``tried``, extracted."""
    configs = dict.fromkeys(each for each in tried if not isinstance(each, nn.Module))
    counted = progress(configs, label="variants")
    return {config: _extracted(dense, calibration, config, store) for config in counted}


def _extracted(dense: nn.Module, calibration: ImageSet, config: ExtractConfig, store: Path) -> Made:
    started = time.perf_counter()
    try:
        run = extract(dense, calibration, config, store=store)
    except MoeeError as error:
        return Made(reason=str(error))
    seconds = time.perf_counter() - started
    facts = {"images": calibration.fingerprint, "config": asdict(config)}
    key = content_key(model=fingerprint(dense), **facts)
    folder = kept(store, f"seconds-{key}", lambda new: write_json(new / "seconds.json", seconds))
    return Made(run.model, run, json.loads((folder / "seconds.json").read_text()))


def _cost(row: Made, dense: nn.Module, counted: MacCount) -> dict[str, Any]:
    saved = dict.fromkeys(("macs_reduction", "params_reduction", "router_macs"), math.nan)
    if row.model is not None:
        saved = savings(row.model, dense, counted)
    return {**saved, "seconds": row.seconds, "reason": row.reason}


def savings(model: nn.Module, dense: nn.Module, counted: MacCount) -> dict[str, float]:
    """What ``model`` saves of the dense model's MACs and parameters, and what its routers cost.

    Shares, with the routing shares that its layers record; ``counted`` is of the dense model.
    """
    mlps = all_mlps(model)
    cost = moe_macs(model, {name: _macs_per_token(mlp) for name, mlp in mlps.items()})
    routers = {name: mlp.router.macs for name, mlp in mlps.items() if isinstance(mlp, MoeMlp)}
    in_routers = sum(counted.tokens[name] * each for name, each in routers.items())
    return {
        "macs_reduction": 1 - cost / counted.total,
        "params_reduction": 1 - count_parameters(model) / count_parameters(dense),
        "router_macs": in_routers / counted.total,
    }


def _macs_per_token(mlp: nn.Module) -> float:
    if isinstance(mlp, MoeMlp):
        return mlp.macs_per_token()
    return sum(linear.in_features * linear.out_features for linear in (mlp.fc1, mlp.fc2))
