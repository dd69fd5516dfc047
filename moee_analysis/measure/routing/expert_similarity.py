"""How alike the mean inputs of experts are (the paper's Figure 5), raw and centred."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.resolve import choose_layers, model_of
from moee_analysis.measure.routing.tables import add_caption, similarity_rank, stack_layers, sum_up
from moee_analysis.moe.layer import moe_layers

NEAR_ORTHOGONAL = 0.2
"""Two mean inputs with a cosine between plus and minus this are called near-orthogonal."""

Source = Extraction | nn.Module | Mapping[int, np.ndarray]


def similarity(
    source: Source,
    *,
    layers: Sequence[int] = (),
    shares: Mapping[int, np.ndarray] | None = None,
    system: str = "MoEE",
) -> pd.DataFrame:
    """Cosine between the mean inputs of every two experts, raw and centred.

    Inputs of deep layers have a large mean in common, which alone makes raw cosines large. The
    centred ones leave out the share-weighted mean of the experts' means. Centred cosines of k
    experts average about -1 / (k - 1) whatever the experts are: look at their spread.

    ``source`` is a run or a routed model, whose routers know their centres; or centres (experts,
    dim) by layer. ``shares`` weigh each expert in the common mean, by layer; None takes the routing
    shares of the calibration tokens, or equal ones where only centres are given.

    Columns: ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an
    expert with itself), ``cosine``, ``cosine_centred``, ``order_a``, ``order_b`` (position for a
    heat map: average linkage of the centred cosines), ``common_mean`` (squared length of the common
    mean / mean squared length of the centres, 0 to 1).
    Raises MoeeError: no layer whose router has centres, or a layer without experts.
    """
    centres, weights = _centres(source)
    weights |= shares or {}
    shown = choose_layers(centres, layers)
    return add_caption(
        stack_layers((system, n, _pairs(centres[n], np.asarray(weights[n]))) for n in shown),
        "Mean inputs of the MLP over the tokens that each expert was made from. Centred: less "
        "their mean, weighted by the experts' shares of tokens.",
    )


def similarity_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up a table of :func:`similarity`: one row per layer, over pairs of different experts.

    Columns: ``system``, ``layer``, ``experts``, ``mean``, ``min``, ``max``, ``spread`` (standard
    deviation), ``near_orthogonal`` (share of pairs with a cosine within ±0.2), the same of the
    centred cosines with the prefix ``centred_``, ``centred_expected`` (-1 / (experts - 1)),
    ``common_mean``.
    """
    return add_caption(sum_up(table, _summary), table.attrs["caption"])


def _centres(source: Source) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
    """Centres (experts, dim) and shares (experts,) by layer."""
    if isinstance(source, Mapping):
        centres = {n: np.asarray(c, dtype=np.float64) for n, c in source.items()}
        shares = {n: np.ones(len(c)) for n, c in centres.items()}
    else:
        routed = moe_layers(model_of(source))
        known = {n: m for n, m in routed.items() if "centres" in dict(m.router.named_buffers())}
        centres = {n: m.router.centres.double().cpu().numpy() for n, m in known.items()}
        shares = {n: m.shares.double().cpu().numpy() for n, m in known.items()}
    if not centres:
        raise MoeeError(
            "layers whose routers have centres", "none",
            "pass an extraction with cosine routers, or {layer: centres}",
        )  # fmt: skip
    return centres, shares


def _pairs(centres: np.ndarray, weights: np.ndarray) -> pd.DataFrame:
    weights = weights / weights.sum()
    common = weights @ centres
    centred = _cosines(centres - common)
    rank = similarity_rank(1 - centred, distances=True)
    experts = pd.DataFrame({"expert": range(len(centres)), "order": rank})
    pairs = experts.merge(experts, how="cross", suffixes=("_a", "_b")).assign(
        cosine=_cosines(centres).ravel(),
        cosine_centred=centred.ravel(),
        common_mean=common @ common / (weights @ (centres**2).sum(axis=1)),
    )
    columns = ["expert_a", "expert_b", "cosine", "cosine_centred", "order_a", "order_b"]
    return pairs[[*columns, "common_mean"]]


def _cosines(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.clip(unit @ unit.T, -1, 1)


def _summary(part: pd.DataFrame) -> dict[str, float]:
    pairs = part[part["expert_a"] < part["expert_b"]]
    experts = int(part["expert_a"].max()) + 1
    row: dict[str, float] = {"experts": experts}
    for prefix, column in (("", "cosine"), ("centred_", "cosine_centred")):
        cosines = pairs[column]
        row |= {
            f"{prefix}mean": float(cosines.mean()),
            f"{prefix}min": float(cosines.min()),
            f"{prefix}max": float(cosines.max()),
            f"{prefix}spread": float(cosines.std(ddof=0)),
            f"{prefix}near_orthogonal": float((cosines.abs() < NEAR_ORTHOGONAL).mean()),
        }
    expected = -1 / (experts - 1) if experts > 1 else np.nan
    return row | {"centred_expected": expected, "common_mean": part["common_mean"].iloc[0]}
