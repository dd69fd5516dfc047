"""What the experts are made of: which neurons they share, and how alike their inputs are."""

from collections.abc import Mapping
from dataclasses import asdict
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import hypergeom

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.inputs import Layers, Run, choose_layers, choose_routed, model_of
from moee_analysis.measure.routing.tables import add_caption, all_rows, order_alike, stack, sum_up
from moee_analysis.moe.layer import MoeMlp, moe_layers

NEAR_ORTHOGONAL = 0.2  # two mean inputs with a cosine between plus and minus this

OfLayers = Mapping[int, np.ndarray]
Source = Run | OfLayers


def layers(run: Extraction) -> pd.DataFrame:
    """What became of every MLP layer of a run: a row of its ``LayerReport`` but for sizes."""
    return pd.DataFrame([asdict(layer) for layer in run.layers]).drop(columns="sizes")


def sizes(run: Run, *, layers: Layers = (), system: str = "MoEE") -> pd.DataFrame:
    """How many hidden neurons each expert keeps, and how many tokens it serves.

    Columns: ``system``, ``layer``, ``expert``, ``neurons``, ``hidden`` (neurons of the dense MLP),
    ``fraction`` (``neurons / hidden``), ``share`` (of the calibration tokens); of the layer
    ``active`` (mean of ``fraction`` over tokens), ``union`` (share of neurons that any keeps).
    Raises MoeeError: no layer with experts, or a chosen layer without them.
    """
    parts = []
    for number, layer in choose_routed(run, layers).items():
        counts, hidden = np.array(layer.expert_sizes), layer.hidden_dense
        shares = layer.shares.double().cpu().numpy()
        table = pd.DataFrame({"expert": range(len(counts)), "neurons": counts, "hidden": hidden})
        table = table.assign(fraction=counts / hidden, share=shares)
        table = table.assign(active=shares @ counts / hidden, union=len(layer.kept) / hidden)
        parts.append((system, number, table))
    return stack(parts)


def neurons(run: Run, *, layers: Layers = (), system: str = "MoEE") -> pd.DataFrame:
    """Which hidden neurons of the dense MLP each expert keeps (the paper's Figure 1, phase 2).

    Columns: ``system``, ``layer``, ``expert``, ``neuron`` (every one of the dense MLP), ``kept``
    (bool), ``order`` (position of the neuron in a picture: those that most experts keep come first,
    and of those kept equally often the ones of the first experts).
    """
    parts = []
    for number, layer in choose_routed(run, layers).items():
        kept = _mark_neurons(layer)
        # the last key counts first
        rank = np.argsort(np.lexsort([*(~kept)[::-1], -kept.sum(axis=0)]))
        table = all_rows(expert=range(len(kept)), neuron=range(kept.shape[1]))
        parts.append((system, number, table.assign(kept=kept.ravel(), order=rank[table["neuron"]])))
    return stack(parts)


def overlap(run: Run, *, layers: Layers = (), system: str = "MoEE") -> pd.DataFrame:
    """How many hidden neurons every two experts share.

    Columns: ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an
    expert with itself), ``neurons_a``, ``neurons_b``, ``shared``, ``jaccard`` (shared / kept by
    either; neurons of high variance are kept by most experts), ``expected_jaccard`` (its
    expectation for random subsets of the same sizes; 1 on the diagonal), ``hidden``.
    """
    parts, expected = [], cache(expected_jaccard)
    for number, layer in choose_routed(run, layers).items():
        kept = _mark_neurons(layer).astype(np.int64)
        hidden, counts, shared = layer.hidden_dense, kept.sum(axis=1), (kept @ kept.T).ravel()
        pairs = all_rows(expert_a=range(len(kept)), expert_b=range(len(kept)))
        a, b = (counts[pairs[expert]] for expert in ("expert_a", "expert_b"))
        chance = [expected(min(both), max(both), hidden) for both in zip(a, b, strict=True)]
        chance = np.where(pairs["expert_a"] == pairs["expert_b"], 1.0, chance)
        pairs = pairs.assign(neurons_a=a, neurons_b=b, shared=shared)
        pairs["jaccard"] = shared / np.maximum(a + b - shared, 1)
        parts.append((system, number, pairs.assign(expected_jaccard=chance, hidden=hidden)))
    return stack(parts)


def expected_jaccard(a: int, b: int, hidden: int) -> float:
    """Expected Jaccard index of random subsets of ``a`` and ``b`` of ``hidden`` neurons."""
    # the number of shared neurons is hypergeometric
    shared = np.arange(max(0, a + b - hidden), min(a, b) + 1)
    return float(hypergeom.pmf(shared, hidden, a, b) @ (shared / np.maximum(a + b - shared, 1)))


def similarity(
    source: Source, *, layers: Layers = (), shares: OfLayers | None = None, system: str = "MoEE"
) -> pd.DataFrame:
    """Cosine between the mean inputs of every two experts, raw and centred (the paper's Figure 5).

    Inputs of deep layers have a large mean in common, which alone makes raw cosines large. Centred
    ones leave out the share-weighted mean of the experts' means; of k experts they average about
    -1 / (k - 1) whatever these are: look at their spread.

    ``source`` is a run or a routed model, whose routers know their centres; or centres (experts,
    dim) by layer. ``shares`` weigh each expert in the common mean, by layer; None: the routing
    shares of the calibration, or equal ones where only centres are given.

    Columns: ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an
    expert with itself), ``cosine``, ``cosine_centred``, ``order_a``, ``order_b`` (position for a
    heat map), ``common_mean`` (its squared length / mean squared length of the centres, 0 to 1).
    Raises MoeeError: no layer whose router has centres, or a layer without experts.
    """
    centres, weights = _read_centres(source)
    weights, parts = {**weights, **(shares or {})}, []
    for layer in choose_layers(centres, layers):
        points, weight = centres[layer], np.asarray(weights[layer]) / np.sum(weights[layer])
        common = weight @ points
        centred = _cosines(points - common)
        rank = order_alike(1 - centred, distances=True)
        pairs = all_rows(expert_a=range(len(points)), expert_b=range(len(points)))
        pairs = pairs.assign(cosine=_cosines(points).ravel(), cosine_centred=centred.ravel())
        pairs = pairs.assign(order_a=rank[pairs["expert_a"]], order_b=rank[pairs["expert_b"]])
        pairs["common_mean"] = common @ common / (weight @ (points**2).sum(axis=1))
        parts.append((system, layer, pairs))
    return add_caption(
        stack(parts),
        "Mean inputs of the MLP over the tokens that each expert was made from. Centred: less "
        "their mean, weighted by the experts' shares of tokens.",
    )


def similarity_summary(table: pd.DataFrame) -> pd.DataFrame:
    """Sum up a table of :func:`similarity`: one row per layer, over pairs of different experts.

    Columns: ``system``, ``layer``, ``experts``, ``mean``, ``min``, ``max``, ``spread`` (standard
    deviation), ``near_orthogonal`` (share of cosines within ±0.2), the same of centred cosines with
    the prefix ``centred_``, ``centred_expected`` (-1 / (experts - 1)), ``common_mean``.
    """

    def describe(part: pd.DataFrame) -> dict[str, float]:
        pairs = part[part["expert_a"] < part["expert_b"]]
        experts = int(part["expert_a"].max()) + 1
        row: dict[str, float] = {"experts": experts}
        for prefix, column in (("", "cosine"), ("centred_", "cosine_centred")):
            cosines = pairs[column]
            near = (cosines.abs() < NEAR_ORTHOGONAL).mean()
            found = {name: getattr(cosines, name)() for name in ("mean", "min", "max")}
            found |= {"spread": cosines.std(ddof=0), "near_orthogonal": near}
            row |= {f"{prefix}{name}": float(value) for name, value in found.items()}
        expected = -1 / (experts - 1) if experts > 1 else np.nan
        return row | {"centred_expected": expected, "common_mean": part["common_mean"].iloc[0]}

    return add_caption(sum_up(table, describe), table.attrs["caption"])


def _mark_neurons(layer: MoeMlp) -> np.ndarray:
    """Whether each expert keeps each neuron of the dense MLP: bool (experts, hidden)."""
    keeps = np.zeros((layer.n_experts, layer.hidden_dense), dtype=bool)
    for expert, row in enumerate(keeps):
        row[layer.kept[layer.expert_neurons(expert)].cpu().numpy()] = True
    return keeps


def _read_centres(source: Source) -> tuple[OfLayers, OfLayers]:
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
        hint = "pass an extraction with cosine routers, or {layer: centres}"
        raise MoeeError("layers whose routers have centres", "none", hint)
    return centres, shares


def _cosines(vectors: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return np.clip(unit @ unit.T, -1, 1)
