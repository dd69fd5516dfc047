"""What the experts are made of: how many hidden neurons each keeps, and which they share."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import hypergeom
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.routing.resolve import choose_layers, model_of
from moee_analysis.measure.routing.tables import all_rows, stack_layers
from moee_analysis.moe.layer import MoeMlp, moe_layers


def layers(run: Extraction) -> pd.DataFrame:
    """What became of every MLP layer of a run: the fields of ``LayerReport``, a row per layer.

    The sizes of the experts are left out.
    """
    return pd.DataFrame([asdict(layer) for layer in run.layers]).drop(columns="sizes")


def sizes(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """How many hidden neurons each expert keeps, and how many tokens it serves.

    Columns: ``system``, ``layer``, ``expert``, ``neurons``, ``hidden`` (neurons of the dense MLP),
    ``fraction`` (``neurons / hidden``), ``share`` (of the calibration tokens), ``active`` (mean of
    ``fraction`` over tokens, the same in a layer), ``union`` (share of the dense neurons that any
    expert keeps, the same in a layer).
    Raises MoeeError: no layer with experts, or a chosen layer without them.
    """
    return _of_layers(run, layers, system, _sizes)


def neurons(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """Which hidden neurons of the dense MLP each expert keeps (the paper's Figure 1, phase 2).

    Columns: ``system``, ``layer``, ``expert``, ``neuron`` (in the dense MLP; every one of them),
    ``kept`` (bool), ``order`` (position of the neuron in a picture: those that many experts keep
    come first, and among those kept equally often the ones of the first experts).
    """
    return _of_layers(run, layers, system, _neurons)


def overlap(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """How many hidden neurons every two experts share.

    Columns: ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an
    expert with itself), ``neurons_a``, ``neurons_b``, ``shared``, ``jaccard`` (shared / kept by
    either), ``expected_jaccard`` (its expectation for random subsets of the same sizes; 1 on the
    diagonal), ``hidden``. Neurons of high variance are kept by most experts, so ``jaccard`` above
    the expectation is the rule.
    """
    return _of_layers(run, layers, system, _overlap)


def expected_jaccard(a: int, b: int, hidden: int) -> float:
    """Expected Jaccard index of random subsets of ``a`` and ``b`` of ``hidden`` neurons.

    The number of shared neurons is hypergeometric.
    """
    if a == 0 and b == 0:
        return 0.0
    shared = np.arange(max(0, a + b - hidden), min(a, b) + 1)
    return float(hypergeom.pmf(shared, hidden, a, b) @ (shared / (a + b - shared)))


def _of_layers(
    run: Extraction | nn.Module,
    layers: Sequence[int],
    system: str,
    describe: Callable[[MoeMlp], pd.DataFrame],
) -> pd.DataFrame:
    found = moe_layers(model_of(run))
    if not found:
        raise MoeeError(
            "a model with experts", "only dense layers",
            "extract with another clustering, or see why layers stayed dense in run.layers",
        )  # fmt: skip
    shown = choose_layers(found, layers)
    return stack_layers((system, layer, describe(found[layer])) for layer in shown)


def _members(module: MoeMlp) -> np.ndarray:
    """Whether each expert keeps each neuron of the dense MLP: bool (experts, hidden)."""
    kept = np.zeros((module.n_experts, module.hidden_dense), dtype=bool)
    union = module.kept.cpu().numpy()
    for expert, row in enumerate(kept):
        row[union[module.expert_neurons(expert).cpu().numpy()]] = True
    return kept


def _sizes(module: MoeMlp) -> pd.DataFrame:
    counts = np.array(module.expert_sizes)
    shares = module.shares.double().cpu().numpy()
    hidden = module.hidden_dense
    return pd.DataFrame({"expert": range(len(counts)), "neurons": counts}).assign(
        hidden=hidden,
        fraction=counts / hidden,
        share=shares,
        active=shares @ counts / hidden,
        union=len(module.kept) / hidden,
    )


def _neurons(module: MoeMlp) -> pd.DataFrame:
    members = _members(module)
    keys = [*(~members)[::-1], -members.sum(axis=0)]  # the last key counts first
    rank = np.argsort(np.lexsort(keys))
    table = all_rows(expert=range(len(members)), neuron=range(members.shape[1]))
    return table.assign(kept=members.ravel(), order=rank[table["neuron"]])


def _overlap(module: MoeMlp) -> pd.DataFrame:
    members = _members(module).astype(np.int64)
    hidden, counts = module.hidden_dense, members.sum(axis=1)
    own = pd.DataFrame({"expert": range(len(counts)), "neurons": counts})
    pairs = own.merge(own, how="cross", suffixes=("_a", "_b"))
    shared = (members @ members.T).ravel()
    either = np.maximum(pairs["neurons_a"] + pairs["neurons_b"] - shared, 1)
    expected = cache(lambda small, large: expected_jaccard(small, large, hidden))
    both = np.sort(pairs[["neurons_a", "neurons_b"]]).tolist()
    jaccard = np.where(pairs["expert_a"] == pairs["expert_b"], 1.0, [expected(*n) for n in both])
    pairs = pairs[["expert_a", "expert_b", "neurons_a", "neurons_b"]]
    return pairs.assign(
        shared=shared, jaccard=shared / either, expected_jaccard=jaccard, hidden=hidden
    )
