"""How evenly the experts are used: routing shares, and what sums them up."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.measure.routing.resolve import Source, all_routes
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.utils.checks import draw_numbers

METRICS = ("entropy", "gini", "max_over_mean", "cv2", "dead")
"""What :func:`balance` measures, in the order of its rows."""

_NO_INTERVAL = (np.nan, np.nan)


def routing(source: Source, images: ImageSet | None = None) -> pd.DataFrame:
    """Share of the routed tokens that each expert takes (the paper's Figure 2).

    Parameters
    ----------
    source, images
        An extraction or a model with routed layers, and the images to route; or the ``Routes``
        of one system, or of several to compare.

    Returns
    -------
    DataFrame
        A row for every expert: ``system``, ``layer``, ``expert``, ``rank`` (0 is the most used
        of its layer), ``tokens``, ``share`` (of all choices, tokens times k: sums to 1 in a
        layer), ``n_experts``, ``k``, ``n_images``.

    Raises
    ------
    MoeeError
        No routed layers, or no images to route.
    """
    layers = [
        _layer_shares(routed, layer)
        for routed in all_routes(source, images)
        for layer in routed.layers
    ]
    return pd.concat(layers, ignore_index=True)


def balance(
    source: Source | pd.DataFrame,
    images: ImageSet | None = None,
    *,
    resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Sum up how even the routing of every layer is.

    Parameters
    ----------
    source, images
        As for :func:`routing`; or a table of :func:`routing`, which knows no single images and
        so gives no intervals.
    resamples, seed
        Of the image bootstrap.

    Returns
    -------
    DataFrame
        A row for every system, layer and metric: ``system``, ``layer``, ``metric``, ``value``,
        ``low``, ``high``, ``n_experts``, ``k``, ``n_images``. Metrics of the shares f of E
        experts: ``entropy`` H(f) / ln E (1 is even), ``gini`` (0 is even), ``max_over_mean``
        E max f (at most E / k), ``cv2`` squared coefficient of variation, ``dead`` experts that
        no token uses. ``low`` and ``high`` are the basic 95 % interval 2v - q of the bootstrap
        over images, kept within the metric's range.

    Raises
    ------
    MoeeError
        No resamples, or what :func:`routing` refuses.
    """
    draw_numbers(seed, resamples=resamples)
    if isinstance(source, pd.DataFrame):
        groups = source.groupby(["system", "layer"], sort=False)
        return pd.DataFrame([row for _, layer in groups for row in _rows_of_table(layer)])
    every = all_routes(source, images)
    rows = [row for routed in every for row in _rows_with_intervals(routed, resamples, seed)]
    return pd.DataFrame(rows)


def balance_metrics(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Metrics of :func:`balance` for token counts [..., experts], over the last axis."""
    experts = tokens.shape[-1]
    shares = tokens / np.maximum(tokens.sum(-1, keepdims=True), 1)
    return {
        "entropy": _entropy(shares) / np.log(max(experts, 2)),
        "gini": _gini(shares),
        "max_over_mean": experts * shares.max(-1),
        "cv2": experts**2 * shares.var(-1),
        "dead": (tokens == 0).sum(-1).astype(float),
    }


def _layer_shares(routed: Routes, layer: int) -> pd.DataFrame:
    tokens = routed.counts[layer].sum(0, dtype=np.int64)
    rank = np.empty(len(tokens), dtype=np.int64)
    rank[np.argsort(-tokens, kind="stable")] = np.arange(len(tokens))
    return pd.DataFrame(
        {
            "system": routed.system,
            "layer": layer,
            "expert": np.arange(len(tokens)),
            "rank": rank,
            "tokens": tokens,
            "share": tokens / tokens.sum(),
            "n_experts": len(tokens),
            "k": routed.k[layer],
            "n_images": routed.n_images,
        }
    )


def _rows_with_intervals(routed: Routes, resamples: int, seed: int) -> Iterator[dict]:
    images = routed.n_images
    drawn = np.random.default_rng(seed).multinomial(images, np.ones(images) / images, resamples)
    for layer in routed.layers:
        counts = routed.counts[layer].astype(np.float64)
        facts = {
            "n_experts": counts.shape[1],
            "k": routed.k[layer],
            "n_images": images,
        }
        values, draws = balance_metrics(counts.sum(0)), balance_metrics(drawn @ counts)
        for metric in METRICS:
            interval = _basic_interval(metric, values[metric], draws[metric], **facts)
            yield _row(routed.system, layer, metric, values[metric], interval) | facts


def _rows_of_table(layer: pd.DataFrame) -> Iterator[dict]:
    first = layer.iloc[0]
    values = balance_metrics(layer["tokens"].to_numpy())
    facts = {name: first[name] for name in ("n_experts", "k", "n_images")}
    for metric in METRICS:
        yield _row(first["system"], first["layer"], metric, values[metric]) | facts


def _row(
    system: str, layer: int, metric: str, value: float, interval: tuple[float, float] = _NO_INTERVAL
) -> dict:
    low, high = interval
    values = {"value": float(value), "low": low, "high": high}
    return {"system": system, "layer": layer, "metric": metric} | values


def _basic_interval(
    metric: str, value: float, draws: np.ndarray, *, n_experts: int, k: int, **_: int
) -> tuple[float, float]:
    """Reflect the bootstrap quantiles about the value, within what the metric can be."""
    low, high = 2 * value - np.quantile(draws, [0.975, 0.025])
    least, most = {
        "entropy": (0, 1),
        "gini": (0, 1),
        "max_over_mean": (1, n_experts / k),
        "cv2": (0, n_experts / k - 1),
        "dead": (0, n_experts - k),
    }[metric]
    return float(np.clip(low, least, most)), float(np.clip(high, least, most))


def _entropy(shares: np.ndarray) -> np.ndarray:
    """Entropy in nats; an unused expert adds nothing."""
    logs = np.log(shares, out=np.zeros_like(shares), where=shares > 0)
    return -(shares * logs).sum(-1)


def _gini(shares: np.ndarray) -> np.ndarray:
    """Gini coefficient of shares that sum to 1: 0 even, near 1 all to one expert."""
    experts = shares.shape[-1]
    weights = 2 * np.arange(1, experts + 1) - experts - 1
    return (np.sort(shares, -1) * weights).sum(-1) / experts
