"""Extractions side by side: several configurations, all on the same images."""

import math
from collections.abc import Hashable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.accuracy import REFERENCE, Scores, score_images, summarize
from moee_analysis.measure.evaluation.engine import Made, Variant, costs_of, extract_all
from moee_analysis.measure.routing.bootstrap import MIDDLE, repeat
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.macs import MacCount, count
from moee_analysis.moe.layer import MoeMlp, all_mlps
from moee_analysis.utils.checks import draw_numbers

SCORES = ["top1", "low", "high", "retention", "retention_low", "retention_high", "agreement", "kl"]
DIVERGENCES = ["kl_low", "kl_high", "kl_change", "kl_change_low", "kl_change_high"]
COSTS = ["macs_reduction", "params_reduction", "router_macs", "seconds", "reason"]


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

    ``tried``: configurations, or models made already that differ from the dense one in their MLPs,
      by the name of the variant.
    ``beside``: by the name of a variant, the name of the one that its KL divergence is compared
      with.
    ``seed``, ``resamples``: of the image bootstrap.

    A row per variant: ``variant``; ``top1``, ``low``, ``high``, ``retention``, ``retention_low``,
    ``retention_high``, ``agreement``, ``kl`` as in ``measure.accuracy``, with the dense model as
    reference; ``kl_low``, ``kl_high``, its 95 % bootstrap interval; ``kl_change``, how much larger
    it is than that of the variant ``beside`` it, with ``kl_change_low`` and ``kl_change_high``
    (paired: both on the same resampled images); ``macs_reduction`` and ``params_reduction``, shares
    of the dense model's, with the routing shares of the calibration; ``router_macs``, what the
    routers cost, as such a share; ``seconds`` the extraction took with this store when it was first
    asked for here, what the store held already not counted; ``reason`` why there is no such model:
    then all numbers are NaN.
    Raises MoeeError: no variants, no images, or a variant to compare with that is not among those
    tried.
    """
    draw_numbers(seed, resamples=resamples)
    names = _check(tried, beside or {})
    made = extract_all(dense, calibration, tried.values(), store)
    rows = [made[each] for each in tried.values()]
    models = {place: row.model for place, row in enumerate(rows) if row.model is not None}
    table = pd.DataFrame({"variant": pd.Series(list(tried), dtype=object)})
    if models:
        scores = score_images(models, images, reference=dense)
        found = summarize(scores, seed=seed, resamples=resamples).set_index("system")
        spread = _compare_divergences(scores, names, seed=seed, resamples=resamples)
        table = table.join(found[SCORES]).join(spread)
    counted = count(dense)
    costs = pd.DataFrame([_costs(row, dense, counted) for row in rows])
    table = table.reindex(columns=["variant", *SCORES, *DIVERGENCES]).join(costs)
    return add_caption(
        table,
        f"{len(images)} images evaluated, reference: the dense model; bars are 95 % intervals of "
        "the image bootstrap; MACs with the routing shares of the calibration.",
    )


def _check(
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


def _compare_divergences(
    scores: Mapping[int, Scores], beside: Mapping[int, int], *, seed: int, resamples: int
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
    table = pd.DataFrame(index=rows, columns=DIVERGENCES, dtype=float)
    table["kl_low"], table["kl_high"] = np.quantile(draws, MIDDLE, axis=0)
    mean, drawn = pd.Series(kl.mean(axis=0), rows), pd.DataFrame(draws, columns=rows)
    for row, other in beside.items():
        if row in rows and other in rows:
            low, high = (drawn[row] - drawn[other]).quantile(MIDDLE)
            table.loc[row, DIVERGENCES[2:]] = mean[row] - mean[other], low, high
    return table


def _costs(row: Made, dense: nn.Module, counted: MacCount) -> dict[str, float | str]:
    costs: dict[str, float | str] = dict.fromkeys(COSTS, math.nan)
    if row.model is not None:
        costs |= costs_of(row.model, dense, counted)
        mlps = all_mlps(row.model).items()
        routers = [counted.tokens[n] * m.router.macs for n, m in mlps if isinstance(m, MoeMlp)]
        costs["router_macs"] = sum(routers) / counted.total
    costs |= {"seconds": row.seconds, "reason": row.reason}
    return {name: costs[name] for name in COSTS}
