"""The hidden neurons of an MLP dealt into experts of equal size."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from moee_analysis.baselines.common.equal_parts import (
    balanced_kmeans,
    best_method,
    cluster_means,
    divide_graph,
)
from moee_analysis.extraction.record.recorded_tokens import LayerSample

BLOCK = 8192  # tokens whose hidden activations are in memory at once
TOGETHER = 8  # tokens in a row that a count of co-activation looks at


@dataclass(frozen=True)
class LayerTokens:
    """Inputs of one MLP, (tokens, dim), each as common as any other, and the image of each."""

    mlp: nn.Module
    inputs: torch.Tensor
    image: np.ndarray

    @torch.no_grad()
    def hidden(self) -> Iterator[torch.Tensor]:
        """Hidden activations (n, hidden) of all tokens, in order, some at a time."""
        for inputs in self.inputs.split(BLOCK):
            yield self.mlp.act(self.mlp.fc1(inputs))

    def mean(self) -> torch.Tensor:
        """Mean of the hidden activations, float64 (hidden,)."""
        return sum(hidden.double().sum(0) for hidden in self.hidden()) / len(self.inputs)


def thin_sample(sample: LayerSample, mlp: nn.Module, *, seed: int = 0) -> LayerTokens:
    """Thin out a recorded ``sample`` of the inputs of ``mlp``, of which few patches stand for many.

    As many leading tokens of each kind stay as make them as common as they are in the images.
    """
    weight = sample.weight[:]
    chance = np.random.default_rng(seed).random(len(weight))
    rows = np.flatnonzero(chance * weight.max() < weight)
    inputs = torch.from_numpy(sample.inputs[rows]).to(mlp.fc1.weight)
    return LayerTokens(mlp, inputs, sample.image[rows])


def split_neurons(split: str, tokens: LayerTokens, experts: int, *, seed: int) -> np.ndarray:
    """Expert of every hidden neuron, int64 (hidden,); sizes differ by one at most.

    ``split`` is a setting of ``MoeficationConfig``.
    """
    if split == "kmeans":
        return balanced_kmeans(_unit_rows(tokens.mlp.fc1.weight), experts, seed=seed)
    if split == "graph":
        return divide_graph(graph_edges(coactivation(tokens.hidden())), experts, seed=seed)
    hidden = tokens.mlp.fc1.out_features
    return np.random.default_rng(seed).permutation(np.arange(hidden) % experts)


def describe_split(split: str) -> str:
    """Name of a split, with the method that divides the graph here."""
    return f"graph, {best_method()}" if split == "graph" else split


def expert_centres(weight: torch.Tensor, expert_of: np.ndarray) -> torch.Tensor:
    """Mean of each expert's L2-normalised rows of W1 (hidden, dim): (experts, dim)."""
    means = cluster_means(_unit_rows(weight), expert_of, int(expert_of.max()) + 1)
    return torch.from_numpy(means).to(weight)


def _unit_rows(weight: torch.Tensor) -> np.ndarray:
    return normalize(weight.detach().double().cpu(), dim=1).numpy()


@torch.no_grad()
def coactivation(hidden: Iterable[torch.Tensor]) -> torch.Tensor:
    """How often neurons are active together, (neurons, neurons).

    Every 8 tokens in a row add min(1, sum_t a_t a_t^T), with a = max(activation, 0), which is
    ReLU's own activation. ``hidden`` are activations (n, neurons) of some tokens after others.
    """
    total = None
    for block in hidden:
        if total is None:
            total = block.new_zeros(block.shape[1], block.shape[1])
        for few in block.clamp(min=0).split(TOGETHER):
            total += (few.T @ few).clamp_(max=1)
    return total


def graph_edges(together: torch.Tensor) -> np.ndarray:
    """Whole weights of the graph's edges, int64 (neurons, neurons), 0 where there is none.

    In units of 0.99 times the lowest decile of ``together`` that is not zero; what is below one is
    no edge.
    """
    values = together.double().cpu().numpy()
    deciles = np.percentile(values, np.arange(10, 101, 10))
    if not deciles.max() > 0:
        return np.zeros(values.shape, dtype=np.int64)
    weights = np.floor(values / (0.99 * deciles[deciles > 0][0])).astype(np.int64)
    np.fill_diagonal(weights, 0)
    return weights
