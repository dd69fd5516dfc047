"""How alike the mean inputs of experts are (the paper's Figure 5), raw and centred."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.routing.resolve import chosen_layers
from moee_analysis.measure.routing.routes import model_of
from moee_analysis.moe.layer import moe_layers

NEAR_ORTHOGONAL = 0.2
"""Two mean inputs with a cosine between plus and minus this are called near-orthogonal."""


def similarity(
    source: Extraction | nn.Module | Mapping[int, np.ndarray],
    *,
    layers: Sequence[int] = (),
    shares: Mapping[int, np.ndarray] | None = None,
    system: str = "MoEE",
) -> pd.DataFrame:
    """Cosine between the mean inputs of every two experts, raw and centred.

    Inputs of deep layers have a large mean in common, which alone makes raw cosines large. The
    centred ones leave out the share-weighted mean of the experts' means. Centred cosines of k
    experts average about -1 / (k - 1) whatever the experts are: look at their spread.

    Parameters
    ----------
    source
        A run or a routed model, whose routers know their centres; or centres (experts, dim)
        by layer.
    layers
        Layers to show, counted from 0; empty: all.
    shares
        Weight of each expert in the common mean by layer; None takes the routing shares of the
        calibration tokens, or equal ones where only centres are given.
    system
        Name of the routed system.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an expert
        with itself), ``cosine``, ``cosine_centred``, ``order_a``, ``order_b`` (position for a
        heat map: average linkage of the centred cosines), ``common_mean`` (squared length of
        the common mean / mean squared length of the centres, 0 to 1).

    Raises
    ------
    MoeeError
        No layer whose router has centres, or a layer without experts.
    """
    centres, weights = _centres(source, shares)
    tables = [
        _pairs(centres[layer], weights[layer]).assign(system=system, layer=layer)
        for layer in chosen_layers(centres, layers)
    ]
    table = pd.concat(tables, ignore_index=True)
    table = table[["system", "layer", *(c for c in table if c not in {"system", "layer"})]]
    table.attrs["caption"] = (
        "Mean inputs of the MLP over the tokens that each expert was made from. Centred: less "
        "their mean, weighted by the experts' shares of tokens."
    )
    return table


def similarity_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up a table of :func:`similarity`: one row per layer, over pairs of different experts.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``experts``, ``mean``, ``min``, ``max``, ``spread`` (standard
        deviation), ``near_orthogonal`` (share of pairs with a cosine within ±0.2), the same of
        the centred cosines with the prefix ``centred_``, ``centred_expected``
        (-1 / (experts - 1)), ``common_mean``.
    """
    groups = table.groupby(["system", "layer"], sort=False)
    rows = [{"system": s, "layer": n} | _summary(part) for (s, n), part in groups]
    summary = pd.DataFrame(rows)
    summary.attrs.update(table.attrs)
    return summary


def _centres(
    source: Extraction | nn.Module | Mapping[int, np.ndarray],
    shares: Mapping[int, np.ndarray] | None,
) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Centres (experts, dim) and shares (experts,) by layer."""
    if isinstance(source, Mapping):
        centres = {n: np.asarray(c, dtype=np.float64) for n, c in source.items()}
        found = {n: np.ones(len(c)) for n, c in centres.items()}
    else:
        routed = moe_layers(model_of(source))
        known = {n: m for n, m in routed.items() if "centres" in dict(m.router.named_buffers())}
        centres = {n: m.router.centres.double().cpu().numpy() for n, m in known.items()}
        found = {n: m.shares.double().cpu().numpy() for n, m in known.items()}
    if not centres:
        raise MoeeError(
            "layers whose routers have centres", "none",
            "pass an extraction with cosine routers, or {layer: centres}",
        )  # fmt: skip
    return centres, found | {n: np.asarray(s) for n, s in (shares or {}).items()}


def _pairs(centres: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    weights = weights / weights.sum()
    common = weights @ centres
    centred = _cosines(centres - common)
    order = np.empty(len(centres), dtype=np.int64)
    order[_by_likeness(centred)] = np.arange(len(centres))
    a, b = (index.ravel() for index in np.indices(centred.shape))
    return pd.DataFrame(
        {
            "expert_a": a,
            "expert_b": b,
            "cosine": _cosines(centres).ravel(),
            "cosine_centred": centred.ravel(),
            "order_a": order[a],
            "order_b": order[b],
            "common_mean": common @ common / (weights @ (centres**2).sum(axis=1)),
        }
    )


def _cosines(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.clip(unit @ unit.T, -1, 1)


def _by_likeness(cosines: np.ndarray) -> np.ndarray:
    """Order that puts like experts side by side."""
    if len(cosines) < 3:
        return np.arange(len(cosines))
    apart = squareform((1 - cosines) * (1 - np.eye(len(cosines))), checks=False)
    return leaves_list(linkage(apart, "average", optimal_ordering=True))


def _summary(part: pd.DataFrame) -> dict[str, float]:
    pairs = part[part["expert_a"] < part["expert_b"]]
    experts = int(part["expert_a"].max()) + 1
    return (
        {"experts": experts}
        | _spread(pairs["cosine"], prefix="")
        | _spread(pairs["cosine_centred"], prefix="centred_")
        | {
            "centred_expected": -1 / (experts - 1) if experts > 1 else np.nan,
            "common_mean": part["common_mean"].iloc[0],
        }
    )


def _spread(cosines: pd.Series, *, prefix: str) -> dict[str, float]:
    values = {
        "mean": cosines.mean(),
        "min": cosines.min(),
        "max": cosines.max(),
        "spread": cosines.std(ddof=0),
        "near_orthogonal": (cosines.abs() < NEAR_ORTHOGONAL).mean(),
    }
    return {prefix + name: float(value) for name, value in values.items()}
