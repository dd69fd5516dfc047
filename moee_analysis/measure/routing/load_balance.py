"""How evenly the experts are used: routing shares, and what sums them up."""

import numpy as np
import pandas as pd
from scipy.special import entr

from moee_analysis.data.images import ImageSet
from moee_analysis.measure.routing.bootstrap import basic_interval, redraw_counts
from moee_analysis.measure.routing.routes import Routes, Source, all_routes
from moee_analysis.measure.routing.tables import stack
from moee_analysis.utils.checks import draw_numbers

METRICS = ("entropy", "gini", "max_over_mean", "cv2", "dead")  # of `balance`, in order


def routing(source: Source, images: ImageSet | None = None) -> pd.DataFrame:
    """Share of the routed tokens that each expert takes (the paper's Figure 2).

    Columns: a row for every expert: ``system``, ``layer``, ``expert``, ``rank`` (0 is the most used
    of its layer), ``tokens``, ``share`` (of all choices, tokens times k: sums to 1 in a layer),
    ``n_experts``, ``k``, ``n_images``.
    Raises MoeeError: no routed layers, or no images to route.
    """
    return stack(
        (routed.system, layer, _layer_shares(routed, layer))
        for routed in all_routes(source, images)
        for layer in routed.layers
    )


def balance(
    source: Source, images: ImageSet | None = None, *, resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Sum up how even the routing of every layer is.

    Columns: a row for every system, layer and metric: ``system``, ``layer``, ``metric``, ``value``,
    ``low``, ``high`` (basic 95 % interval of the bootstrap over images), ``n_experts``, ``k``,
    ``n_images``. Metrics of the shares f of E experts: ``entropy`` H(f) / ln E (1 is even),
    ``gini`` (0 is even), ``max_over_mean`` E max f (at most E / k), ``cv2`` squared coefficient of
    variation, ``dead`` experts that no token uses.
    Raises MoeeError: no resamples, or what :func:`routing` refuses.
    """
    draw_numbers(seed, resamples=resamples)
    parts = []
    for routed in all_routes(source, images):
        drawn = redraw_counts(routed.n_images, resamples, seed=seed)
        parts += [(routed.system, layer, _balance(routed, layer, drawn)) for layer in routed.layers]
    return stack(parts)


def balance_metrics(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of :func:`balance` for token counts [..., experts], over the last axis."""
    experts = tokens.shape[-1]
    shares = tokens / np.maximum(tokens.sum(-1, keepdims=True), 1)
    weights = 2 * np.arange(1, experts + 1) - experts - 1
    return {
        "entropy": entr(shares).sum(-1) / np.log(max(experts, 2)),
        "gini": (np.sort(shares, -1) * weights).sum(-1) / experts,
        "max_over_mean": experts * shares.max(-1),
        "cv2": experts**2 * shares.var(-1),
        "dead": (tokens == 0).sum(-1).astype(float),
    }


def _layer_shares(routed: Routes, layer: int) -> pd.DataFrame:
    tokens = routed.counts[layer].sum(0, dtype=np.int64)
    rank = np.argsort(np.argsort(-tokens, kind="stable"))
    table = pd.DataFrame({"expert": range(len(tokens)), "rank": rank, "tokens": tokens})
    table = table.assign(share=tokens / tokens.sum(), n_experts=len(tokens))
    return table.assign(k=routed.k[layer], n_images=routed.n_images)


def _balance(routed: Routes, layer: int, drawn: np.ndarray) -> pd.DataFrame:
    """Metrics of one layer; intervals by images redrawn so often, (resamples, images)."""
    tokens, k = routed.counts[layer].astype(np.float64), routed.k[layer]
    experts, values = tokens.shape[1], balance_metrics(tokens.sum(axis=0))
    table = pd.DataFrame({"metric": METRICS, "value": [values[name] for name in METRICS]})
    draws = np.stack([*balance_metrics(drawn @ tokens).values()], axis=1)
    least, most = [0, 0, 1, 0, 0], [1, 1, experts / k, experts / k - 1, experts - k]
    table["low"], table["high"] = basic_interval(table["value"], draws, least=least, most=most)
    return table.assign(n_experts=experts, k=k, n_images=routed.n_images)
