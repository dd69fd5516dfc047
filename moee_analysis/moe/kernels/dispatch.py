"""Ways to compute a layer of experts: they differ in speed and agree in what they compute.

Each takes a layer, its tokens (n, dim) and the experts chosen for each, int64 (n, k), and gives
the outputs (n, dim). None of them works token by token.

- ``masked``: all stored neurons for all tokens, then zeros where a token's experts lack them.
- ``sorted``: tokens sorted by expert once, then contiguous products, a group of experts at a time.
- ``grouped_mm``: the same groups in two calls of ``torch.nn.functional.grouped_mm``, which does
  not wait to know how many tokens each one gets; for GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import grouped_mm

from moee_analysis.moe.kernels.group_mlps import padded, parts, whole
from moee_analysis.utils.matmul import KERNELS, STEP, is_traced, onednn_takes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moee_analysis.moe.kernels.expert_groups import Layout
    from moee_analysis.moe.layer import MoeMlp

WAYS = ("masked", "sorted", "grouped_mm")
BLOCK = 1024  # tokens whose hidden activations stay in the cache of a CPU


@dataclass(frozen=True)
class Way:
    """One of :data:`WAYS`, with so many ``groups`` of experts; None: every expert by itself.

    ``kernel`` multiplies the matrices, if it takes such tokens.
    """

    name: str
    groups: int | None = None
    kernel: str = "blas"

    def __str__(self) -> str:
        groups = [] if self.groups is None else [f"{self.groups} groups"]
        kernel = [] if self.kernel == "blas" else [KERNELS[self.kernel]]
        return ", ".join([self.name, *groups, *kernel])

    def __call__(self, layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        """Compute the layer's outputs (n, dim) for ``tokens`` (n, dim)."""
        kernel = self.kernel if onednn_takes(tokens) else "blas"
        if self.name == "masked" or not len(tokens) or not layer.fc1.out_features:
            return masked(layer, tokens, chosen, kernel)
        layout = layer.layout(self.groups)
        if self.name == "sorted":
            pairs = in_groups(layer, tokens, chosen, layout, kernel)
        else:
            pairs = by_grouped_mm(layer, tokens, chosen, layout)
        per_token = chosen.shape[1]
        if per_token == 1:
            return pairs
        return pairs.unflatten(0, (-1, per_token)).sum(dim=1) + layer.fc2.bias


def masked(layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor, kernel: str) -> torch.Tensor:
    """Compute all stored neurons for all tokens, and drop what a token's experts lack."""
    if chosen.shape[1] == 1 and layer.columns is None:
        compute, experts = whole(layer, kernel), chosen[:, 0]
    else:
        compute, experts = partial(_summed, layer), chosen
    blocks = zip(in_blocks(tokens), in_blocks(experts), strict=True)
    outputs = [compute(*block) for block in blocks]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def in_blocks(tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split ``tokens`` (n, ...) into so many at a time that their activations stay in the cache.

    They stay together where no cache is to be filled: off the CPU, and in a trace, which has to
    fit any number of tokens.
    """
    if is_traced() or tokens.device.type != "cpu" or len(tokens) <= BLOCK:
        return (tokens,)
    return tokens.split(BLOCK)


def _summed(layer: MoeMlp, x: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """Outputs for ``x`` (n, dim) of several experts each, or of such with a W2 of their own."""
    hidden = layer.act(layer.fc1(x))
    if layer.columns is not None:
        hidden = hidden.index_select(1, layer.neurons)
    kept = (layer.lacking == 0).to(hidden.dtype)
    ones = torch.ones_like(chosen, dtype=hidden.dtype)
    chooses = hidden.new_zeros(x.shape[0], len(kept)).scatter_add(1, chosen, ones)
    hidden = hidden * (chooses @ kept)  # how many of the token's experts keep the neuron
    constant = layer.fc2.bias
    if layer.shift is not None:
        constant = constant + layer.shift[chosen].sum(dim=1)
    return torch.addmm(constant, hidden, layer.fc2.weight.T)


def in_groups(
    layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor, layout: Layout, kernel: str
) -> torch.Tensor:
    """Outputs (n k, dim) of pairs of a token and an expert, one group of experts at a time."""
    per_token, outputs = chosen.shape[1], []
    mlps = parts(layer, layout, kernel, per_token=per_token, tokens=len(tokens))
    places, pairs = layout.place[chosen.flatten()].sort()
    for number, met in _met(layout, places):
        mlp = mlps(number)
        for block in zip(in_blocks(pairs[met]), in_blocks(places[met]), strict=True):
            of_block, at = map(_in_steps, block) if kernel == "onednn" else block
            x = tokens.index_select(0, of_block if per_token == 1 else of_block // per_token)
            outputs.append(mlp(x, at)[: len(block[0])])
    return torch.cat(outputs).index_select(0, _inverse(pairs))


def _in_steps(ids: torch.Tensor) -> torch.Tensor:
    """``ids`` (n,), the last of them again until they are a multiple of :data:`STEP`."""
    return torch.cat([ids, ids[-1:].expand(-len(ids) % STEP)])


def _met(layout: Layout, places: torch.Tensor) -> Iterator[tuple[int, slice]]:
    """Yield the groups that get any tokens, and where the sorted ``places`` have theirs."""
    stops = [*places.bincount(minlength=len(layout.place)).cumsum(0).tolist(), 0]
    for number, part in enumerate(layout.parts):
        met = slice(stops[part.start - 1], stops[part.stop - 1])
        if met.start < met.stop:
            yield number, met


def by_grouped_mm(
    layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor, layout: Layout
) -> torch.Tensor:
    """Outputs (n k, dim) of pairs of a token and an expert, all groups of experts at once."""
    per_token, groups = chosen.shape[1], layout.padded
    places, pairs = layout.place[chosen.flatten()].sort()
    stops = torch.searchsorted(places, groups.stops).int()
    x = tokens.index_select(0, pairs // per_token)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    mlps = padded(layer, layout, x.dtype, per_token=per_token, tokens=len(tokens))
    hidden = grouped_mm(x, mlps.W1.mT, offs=stops)
    if mlps.b1 is not None:
        hidden = hidden + mlps.b1.index_select(0, groups.group.index_select(0, places))
    hidden = layer.act(hidden) * mlps.kept.index_select(0, places)
    y = grouped_mm(hidden, mlps.outward, offs=stops)
    y = y + mlps.constants.index_select(0, places)
    return y.index_select(0, _inverse(pairs))


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """Where each one stands in ``order``, a permutation (n,)."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
