"""Ways to deal the hidden neurons of an MLP into experts of equal size."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch.nn.functional import normalize

from moee_analysis.baselines.common.balanced_kmeans import balanced_kmeans, means
from moee_analysis.baselines.common.graph_partition import best_method, partition
from moee_analysis.baselines.moefication.coactivation import coactivation, edges
from moee_analysis.baselines.moefication.layer_tokens import LayerTokens


def expert_of_neurons(split: str, tokens: LayerTokens, experts: int, *, seed: int) -> np.ndarray:
    """Expert of every hidden neuron, int64 (hidden,); sizes differ by one at most."""
    return _SPLITS[split](tokens, experts, seed)


def told(split: str) -> str:
    """Name of a split, with the method that divides the graph here."""
    return f"graph, {best_method()}" if split == "graph" else split


def centres(weight: torch.Tensor, expert_of: np.ndarray) -> torch.Tensor:
    """Mean of each expert's L2-normalised rows of W1 (hidden, dim): (experts, dim)."""
    found = means(_rows(weight), expert_of, int(expert_of.max()) + 1)
    return torch.from_numpy(found).to(weight)


def _rows(weight: torch.Tensor) -> np.ndarray:
    """L2-normalised rows of W1; biases are left out."""
    return normalize(weight.detach().double().cpu(), dim=1).numpy()


def _by_kmeans(tokens: LayerTokens, experts: int, seed: int) -> np.ndarray:
    return balanced_kmeans(_rows(tokens.mlp.fc1.weight), experts, seed=seed)


def _by_graph(tokens: LayerTokens, experts: int, seed: int) -> np.ndarray:
    return partition(edges(coactivation(tokens.hidden())), experts, seed=seed)


def _at_random(tokens: LayerTokens, experts: int, seed: int) -> np.ndarray:
    hidden = tokens.mlp.fc1.out_features
    return np.random.default_rng(seed).permutation(np.arange(hidden) % experts)


_SPLITS: dict[str, Callable[[LayerTokens, int, int], np.ndarray]] = {
    "kmeans": _by_kmeans, "graph": _by_graph, "random": _at_random,
}  # fmt: skip
