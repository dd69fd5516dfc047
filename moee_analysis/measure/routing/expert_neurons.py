"""What the experts are made of: how many hidden neurons each keeps, and which they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import cache

import numpy as np
import pandas as pd
from scipy.stats import hypergeom
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.routing.resolve import chosen_layers
from moee_analysis.measure.routing.routes import model_of
from moee_analysis.moe.layer import MoeMlp, moe_layers


def layers(run: Extraction) -> pd.DataFrame:
    """What became of every MLP layer of a run: its experts, or why it stayed dense.

    Returns
    -------
    DataFrame
        The fields of ``LayerReport``, a row per layer, without
        the sizes of the experts; ``dense_tokens`` as one text.
    """
    table = pd.DataFrame([asdict(layer) for layer in run.layers]).drop(columns="sizes")
    return table.assign(dense_tokens=[", ".join(kinds) for kinds in table["dense_tokens"]])


def sizes(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """How many hidden neurons each expert keeps, and how many tokens it serves.

    Parameters
    ----------
    run
        An extraction or a model with routed layers.
    layers
        Layers to show, counted from 0; empty: all.
    system
        Name of the routed system.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``expert``, ``neurons``, ``hidden`` (neurons of the dense MLP),
        ``fraction`` (``neurons / hidden``), ``share`` (of the calibration tokens), ``active``
        (mean of ``fraction`` over tokens, the same in a layer), ``union`` (share of the dense
        neurons that any expert keeps, the same in a layer).

    Raises
    ------
    MoeeError
        No layer with experts, or a chosen layer without them.
    """
    tables = [
        _sizes(module).assign(system=system, layer=layer)
        for layer, module in _routed_layers(run, layers).items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["system", "layer", *(c for c in table if c not in {"system", "layer"})]]


def neurons(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """Which hidden neurons of the dense MLP each expert keeps (the paper's Figure 1, phase 2).

    Parameters as in :func:`sizes`.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``expert``, ``neuron`` (in the dense MLP; every one of them),
        ``kept`` (bool), ``order`` (position of the neuron in a picture: those that many experts
        keep come first, and among those kept equally often the ones of the first experts).
    """
    tables = [
        _membership(module).assign(system=system, layer=layer)
        for layer, module in _routed_layers(run, layers).items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["system", "layer", "expert", "neuron", "kept", "order"]]


def overlap(
    run: Extraction | nn.Module, *, layers: Sequence[int] = (), system: str = "MoEE"
) -> pd.DataFrame:
    """How many hidden neurons every two experts share.

    Parameters as in :func:`sizes`.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``expert_a``, ``expert_b`` (every ordered pair, also of an expert
        with itself), ``neurons_a``, ``neurons_b``, ``shared``, ``jaccard`` (shared / kept by
        either), ``expected_jaccard`` (its expectation for random subsets of the same sizes; 1
        on the diagonal), ``hidden``. Neurons of high variance are kept by most experts, so
        ``jaccard`` above the expectation is the rule.
    """
    tables = [
        _overlap(module).assign(system=system, layer=layer)
        for layer, module in _routed_layers(run, layers).items()
    ]
    table = pd.concat(tables, ignore_index=True)
    return table[["system", "layer", *(c for c in table if c not in {"system", "layer"})]]


def expected_jaccard(a: int, b: int, hidden: int) -> float:
    """Expected Jaccard index of random subsets of ``a`` and ``b`` of ``hidden`` neurons.

    The number of shared neurons is hypergeometric.
    """
    if a == 0 and b == 0:
        return 0.0
    shared = np.arange(max(0, a + b - hidden), min(a, b) + 1)
    return float(hypergeom.pmf(shared, hidden, a, b) @ (shared / (a + b - shared)))


def _routed_layers(run: Extraction | nn.Module, layers: Sequence[int]) -> dict[int, MoeMlp]:
    found = moe_layers(model_of(run))
    if not found:
        raise MoeeError(
            "a model with experts", "only dense layers",
            "extract with another clustering, or see why layers stayed dense in run.layers",
        )  # fmt: skip
    return {layer: found[layer] for layer in chosen_layers(found, layers)}


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
    return pd.DataFrame(
        {
            "expert": np.arange(len(counts)),
            "neurons": counts,
            "hidden": hidden,
            "fraction": counts / hidden,
            "share": shares,
            "active": shares @ counts / hidden,
            "union": len(module.kept) / hidden,
        }
    )


def _membership(module: MoeMlp) -> pd.DataFrame:
    members = _members(module)
    experts, hidden = members.shape
    order = np.empty(hidden, dtype=np.int64)
    keys = [*(~members)[::-1], -members.sum(axis=0)]  # the last key counts first
    order[np.lexsort(keys)] = np.arange(hidden)
    return pd.DataFrame(
        {
            "expert": np.repeat(np.arange(experts), hidden),
            "neuron": np.tile(np.arange(hidden), experts),
            "kept": members.ravel(),
            "order": np.tile(order, experts),
        }
    )


def _overlap(module: MoeMlp) -> pd.DataFrame:
    members = _members(module).astype(np.int64)
    hidden, counts = module.hidden_dense, members.sum(axis=1)
    shared = members @ members.T
    a, b = (index.ravel() for index in np.indices(shared.shape))
    expected = cache(lambda m, n: expected_jaccard(m, n, hidden))
    either = np.maximum(counts[a] + counts[b] - shared.ravel(), 1)
    return pd.DataFrame(
        {
            "expert_a": a,
            "expert_b": b,
            "neurons_a": counts[a],
            "neurons_b": counts[b],
            "shared": shared.ravel(),
            "jaccard": shared.ravel() / either,
            "expected_jaccard": [
                1.0 if i == j else expected(*sorted((int(counts[i]), int(counts[j]))))
                for i, j in zip(a, b, strict=True)
            ],
            "hidden": hidden,
        }
    )
