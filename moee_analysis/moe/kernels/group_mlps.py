"""Groups of experts as MLPs: their weights laid out for one product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from moee_analysis.moe.kernels.expert_groups import Part
from moee_analysis.utils.matmul import STEP, Product

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    from moee_analysis.moe.kernels.expert_groups import Layout
    from moee_analysis.moe.layer import MoeMlp

MOST = 3  # times the stored neurons that may be kept laid out for one way of computing a layer
FEW = 8192  # tokens beyond which laying out takes no time to speak of


@dataclass(frozen=True)
class PartMlp:
    """The MLP of a group of experts: its neurons one after the other in memory.

    Neurons that an expert lacks are told in one of two ways, both (experts, neurons); in none, if
    nothing is lacking. ``biases`` are b1, and far below zero for what is lacking, which makes it
    silent without a pass of its own over the activations. Where oneDNN activates as it multiplies,
    or what is far below zero activates something, activations are multiplied by ``kept``, 0 or 1.
    """

    part: Part
    act: nn.Module
    inward: Product  # W1
    b1: torch.Tensor | None
    outward: Product  # W2
    constants: torch.Tensor  # of all experts, in the layout's order
    biases: torch.Tensor | None
    kept: torch.Tensor | None

    def __call__(self, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Outputs (n, dim) for ``x`` (n, dim) of the experts at ``places`` of the layout."""
        hidden = self._hidden(x, places - self.part.start if self.part.start else places)
        if self.part.stop - self.part.start == 1:
            return self.outward(hidden, self.constants[self.part.start])
        return self.outward.onto(self.constants.index_select(0, places), hidden)

    def _hidden(self, x: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """Activations (n, neurons), zeros where the ``experts`` of the group lack the neuron."""
        if self.biases is not None:
            return self.act(self.inward.onto(self.biases.index_select(0, experts), x))
        hidden = self.inward.activated(x, self.b1, self.act)
        if self.kept is None:
            return hidden
        kept = self.kept.index_select(0, experts)
        return hidden * kept if torch.is_grad_enabled() else hidden.mul_(kept)


@dataclass(frozen=True)
class Maker:
    """Makes the MLPs of a layer's groups, by one ``kernel``, ``packed`` if they serve many calls.

    ``outward`` is W2^T (columns, dim), ``constants`` (experts, dim) are in the layout's order.
    """

    layer: MoeMlp
    outward: torch.Tensor
    constants: torch.Tensor
    kernel: str
    packed: bool

    def __call__(self, part: Part) -> PartMlp:
        """Lay out the weights of a ``part`` of the layer."""
        layer, outward, lacking = self.layer, self.outward, part.lacking
        W1, b1 = layer.fc1.weight, layer.fc1.bias
        if part.neurons is not None:
            W1, outward = W1.index_select(0, part.neurons), outward.index_select(0, part.columns)
            b1 = None if b1 is None else b1.index_select(0, part.neurons)
        biases = kept = None
        if lacking is not None and layer.silent and self.kernel == "blas":
            biases = lacking if b1 is None else lacking + b1
        elif lacking is not None:
            kept = (lacking == 0).to(W1.dtype)
        if self.kernel == "onednn":
            W1, b1, kept, outward = _in_steps(W1, b1, kept, outward)
        inward, outward = self._product(W1), self._product(outward.T)
        return PartMlp(part, layer.act, inward, b1, outward, self.constants, biases, kept)

    def _product(self, weight: torch.Tensor) -> Product:
        return Product.of(weight, self.kernel, packed=self.packed)


def whole(layer: MoeMlp, kernel: str) -> PartMlp:
    """All experts as one group, in their own order, of tokens that have one expert each."""

    def made() -> PartMlp:
        shared = constants(layer, per_token=1)
        make = Maker(layer, layer.fc2.weight.T, shared, kernel, packed=True)
        return make(Part(0, layer.n_experts, None, None, layer.lacking))

    return layer.laid_out.get(("whole", kernel), weights_of(layer), made)


def parts(
    layer: MoeMlp, layout: Layout, kernel: str, *, per_token: int, tokens: int
) -> Callable[[int], PartMlp]:
    """The MLP of each group of ``layout`` by its number, for a call with so many ``tokens``."""
    worth = worth_keeping(layer, layout.neurons, tokens=tokens)

    def made_one_by_one() -> Callable[[int], PartMlp]:
        shared = constants(layer, per_token).index_select(0, layout.order)
        make = Maker(layer, layer.fc2.weight.T.contiguous(), shared, kernel, packed=worth)
        return lambda number: make(layout.parts[number])

    def made() -> list[PartMlp]:
        return [*map(made_one_by_one(), range(len(layout.parts)))]

    if worth:
        key = "parts", len(layout.parts), per_token, kernel
        return layer.laid_out.get(key, weights_of(layer), made).__getitem__
    return made_one_by_one()


def _in_steps(
    W1: torch.Tensor, b1: torch.Tensor | None, kept: torch.Tensor | None, outward: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor]:
    """Join neurons without weights until they are a multiple of :data:`STEP`."""
    missing = -len(W1) % STEP
    b1, kept = (None if each is None else pad(each, (0, missing)) for each in (b1, kept))
    return pad(W1, (0, 0, 0, missing)), b1, kept, pad(outward, (0, 0, 0, missing))


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
        key = "padded", len(groups.neurons), per_token, dtype
        return layer.laid_out.get(key, weights_of(layer), made)
    return made()


def worth_keeping(layer: MoeMlp, neurons: int, *, tokens: int) -> bool:
    """Whether so many ``neurons``, laid out, are kept from one call with ``tokens`` to the next."""
    return tokens <= FEW and neurons <= MOST * layer.fc1.out_features


def weights_of(layer: MoeMlp) -> list[torch.Tensor]:
    """All weights that are laid out."""
    given = (layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias, layer.shift)
    return [weight for weight in given if weight is not None]


def constants(layer: MoeMlp, per_token: int) -> torch.Tensor:
    """What each expert adds whatever its token is, (experts, dim); b2 too if it is the only one."""
    bias = layer.fc2.bias if per_token == 1 else torch.zeros_like(layer.fc2.bias)
    if layer.shift is None:
        return bias.expand(layer.n_experts, -1)
    return layer.shift + bias
