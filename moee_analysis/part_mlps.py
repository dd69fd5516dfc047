"""Groups of experts as MLPs: their weights laid out for one product, and kept while they hold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.nn.functional import linear

from moee_analysis.layouts import Part

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from torch import nn

    from moee_analysis.layers import MoeMlp
    from moee_analysis.layouts import Layout

T = TypeVar("T")
MOST = 3  # times the stored neurons that may be kept laid out for one way of computing a layer
FEW = 8192  # tokens beyond which laying out takes no time to speak of


@dataclass(frozen=True)
class PartMlp:
    """The MLP of a group of experts: its neurons one after the other in memory.

    ``biases`` (experts, neurons) are b1 for the neurons that an expert keeps, and far below zero
    for those it lacks, which makes them silent without a pass of its own over the activations;
    None: nothing is lacking, or what is far below zero activates something.
    """

    part: Part
    act: nn.Module
    W1: torch.Tensor
    b1: torch.Tensor | None
    outward: torch.Tensor  # W2^T
    constants: torch.Tensor  # of all experts, in the layout's order
    biases: torch.Tensor | None

    @classmethod
    def of(
        cls, layer: MoeMlp, part: Part, outward: torch.Tensor, constants: torch.Tensor
    ) -> PartMlp:
        """Lay out a ``part`` of the layer, of whose W2^T ``outward`` has the rows."""
        W1, b1 = layer.fc1.weight, layer.fc1.bias
        if part.neurons is not None:
            W1, outward = W1.index_select(0, part.neurons), outward.index_select(0, part.columns)
            b1 = None if b1 is None else b1.index_select(0, part.neurons)
        biases = None
        if part.lacking is not None and layer.silent:
            biases = part.lacking if b1 is None else part.lacking + b1
        return cls(part, layer.act, W1, b1, outward, constants, biases)

    def __call__(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Outputs (n, dim) for ``x`` (n, dim) of the experts at ``places`` of the layout."""
        hidden = self._hidden(x, places - self.part.start if self.part.start else places)
        if self.part.stop - self.part.start == 1:
            return torch.addmm(self.constants[self.part.start], hidden, self.outward)
        return _added(self.constants.index_select(0, places), hidden, self.outward)

    def _hidden(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Activations (n, neurons), zeros where the ``experts`` of the group lack the neuron."""
        if self.biases is not None:
            return self.act(_added(self.biases.index_select(0, experts), x, self.W1.T))
        hidden = self.act(linear(x, self.W1, self.b1))
        if self.part.lacking is None:
            return hidden
        return hidden * (self.part.lacking == 0).index_select(0, experts)


def whole(layer: MoeMlp) -> PartMlp:
    """All experts as one group, in their own order, of tokens that have one expert each."""

    def made() -> PartMlp:
        part = Part(0, layer.n_experts, None, None, layer.lacking)
        return PartMlp.of(layer, part, layer.fc2.weight.T, constants(layer, per_token=1))

    return kept(layer, "whole", made)


def parts(
    layer: MoeMlp, layout: Layout, *, per_token: int, tokens: int
) -> Callable[[int], PartMlp]:
    """The MLP of each group of ``layout`` by its number, for a call with so many ``tokens``."""

    def made_one_by_one() -> Callable[[int], PartMlp]:
        shared = constants(layer, per_token).index_select(0, layout.order)
        outward = layer.fc2.weight.T.contiguous()
        return lambda number: PartMlp.of(layer, layout.parts[number], outward, shared)

    def made() -> list[PartMlp]:
        return [*map(made_one_by_one(), range(len(layout.parts)))]

    if worth_keeping(layer, layout.neurons, tokens=tokens):
        return kept(layer, ("parts", len(layout.parts), per_token), made).__getitem__
    return made_one_by_one()


@dataclass(frozen=True)
class PaddedMlps:
    """The MLPs of all groups of experts, filled up to the same width: see :class:`Padded`.

    ``W1`` (groups, width, dim), ``b1`` (groups, width), ``outward`` W2^T (groups, width, dim);
    ``kept`` (experts, width) and ``constants`` (experts, dim) in the layout's order.
    """

    W1: torch.Tensor
    b1: torch.Tensor | None
    outward: torch.Tensor
    kept: torch.Tensor
    constants: torch.Tensor


def padded(
    layer: MoeMlp, layout: Layout, dtype: torch.dtype, *, per_token: int, tokens: int
) -> PaddedMlps:
    """The MLPs of all groups of ``layout``, for a call with so many ``tokens``."""
    groups = layout.padded

    def made() -> PaddedMlps:
        b1, shared = layer.fc1.bias, constants(layer, per_token).index_select(0, layout.order)
        return PaddedMlps(
            layer.fc1.weight[groups.neurons].to(dtype),
            None if b1 is None else b1[groups.neurons].to(dtype),
            layer.fc2.weight.T[groups.columns].to(dtype),
            groups.kept.to(dtype),
            shared.to(dtype),
        )

    if worth_keeping(layer, groups.neurons.numel(), tokens=tokens):
        return kept(layer, ("padded", len(groups.neurons), per_token, dtype), made)
    return made()


def worth_keeping(layer: MoeMlp, neurons: int, *, tokens: int) -> bool:
    """Whether so many ``neurons``, laid out, are kept from one call with ``tokens`` to the next."""
    return tokens <= FEW and neurons <= MOST * layer.fc1.out_features


def kept(layer: MoeMlp, key: Hashable, make: Callable[[], T]) -> T:
    """What ``make`` makes of the weights of ``layer``, once for as long as they do not change.

    All changes that torch counts are seen; values written through ``.data`` are not counted.
    """
    version = _version(layer)
    if version is None:
        return make()
    found = layer.laid_out.get(key)
    if found is None or found[0] != version:
        found = layer.laid_out[key] = version, make()
    return found[1]


def _version(layer: MoeMlp) -> Hashable | None:
    """What changes with the weights of ``layer``; None if that cannot be told, or in training."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    fc1, fc2 = layer.fc1, layer.fc2
    given = (fc1.weight, fc1.bias, fc2.weight, fc2.bias, layer.shift)
    weights = [weight for weight in given if weight is not None]
    if any(weight.is_inference() for weight in weights):
        return None
    return tuple([(weight.data_ptr(), weight._version) for weight in weights])


def constants(layer: MoeMlp, per_token: int) -> torch.Tensor:
    """What each expert adds whatever its token is, (experts, dim); b2 too if it is the only one."""
    bias = layer.fc2.bias if per_token == 1 else torch.zeros_like(layer.fc2.bias)
    if layer.shift is None:
        return bias.expand(layer.n_experts, -1)
    return layer.shift + bias


def _added(to: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``to`` + ``x weight``, in the memory of ``to`` where neither autograd nor autocast minds."""
    if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
        return torch.addmm(to, x, weight)
    return to.addmm_(x, weight)
