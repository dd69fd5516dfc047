"""Soft MoE: every slot is a mixture of all tokens of an image, every token one of all slots.

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951; the router
is that of its algorithms 1 and 2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from moee_analysis.baselines.common.replace_mlps import ExpertMlps

EPSILON = 1e-6  # added to squared lengths


class Mixing(NamedTuple):
    """How slots are made of tokens, and tokens of the experts' outputs for the slots.

    Both are (images, tokens, slots): ``dispatch`` sums to 1 over the tokens, ``combine`` over the
    slots. The slots of one expert stand beside each other.
    """

    dispatch: torch.Tensor
    combine: torch.Tensor


class SlotMlp(nn.Module):
    """Experts on slots, in the place of an MLP.

    - ``router``: tokens (images, tokens, dim) -> :class:`Mixing`.
    - ``groups``: experts in the order of their slots, in groups of one number of hidden neurons.
    - ``slots``: slots of each expert.
    - ``drop``: drops experts in training: outputs (images, experts, slots, dim) -> the same.
    """

    def __init__(
        self,
        router: nn.Module,
        groups: Sequence[ExpertMlps],
        *,
        slots: int = 1,
        drop: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.router, self.groups, self.slots = router, nn.ModuleList(groups), slots
        self.drop = nn.Identity() if drop is None else drop

    @property
    def n_experts(self) -> int:
        """Number of experts of all groups."""
        return sum(group.n_experts for group in self.groups)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map the tokens of images, (images, ..., dim), to outputs of the same shape."""
        tokens = x.flatten(1, -2)
        mixing = self.router(tokens)
        outputs = self.slot_outputs(tokens, mixing).flatten(1, 2)
        return (mixing.combine @ outputs).reshape(*x.shape[:-1], outputs.shape[-1])

    def slot_outputs(self, tokens: torch.Tensor, mixing: Mixing) -> torch.Tensor:
        """Outputs of the experts for their slots of ``tokens``: (images, experts, slots, dim)."""
        slots = (mixing.dispatch.mT @ tokens).unflatten(1, (self.n_experts, self.slots))
        own = slots.split([group.n_experts for group in self.groups], dim=1)
        outputs = [group(part) for group, part in zip(self.groups, own, strict=True)]
        return self.drop(torch.cat(outputs, dim=1))

    def usage(self, mixing: Mixing) -> torch.Tensor:
        """Share of the tokens' outputs that comes from each expert, summed over tokens, (experts,).

        It sums to the number of tokens.
        """
        by_slot = mixing.combine.detach().double().sum(dim=(0, 1))
        return by_slot.unflatten(0, (self.n_experts, self.slots)).sum(dim=1)

    def random_router(self, seed: int = 0) -> "ShuffledMixing":
        """Return a router that gives every token the mixing of another one."""
        return ShuffledMixing(self.router, seed=seed)

    def constant_router(self) -> "EvenMixing":
        """Return a router that mixes all tokens, and all slots, evenly."""
        return EvenMixing(self.n_experts * self.slots)


class SoftRouter(nn.Module):
    """Dispatch and combine by the cosines of tokens and learned slot embeddings.

    A softmax of the logits over the tokens dispatches, one over all slots combines. The
    ``embeddings`` (dim, experts, slots), drawn from N(0, 1 / dim) by the ``seed``, and ``scale``, a
    factor on the cosines, are learned; ``noise`` is the standard deviation of what is added to the
    logits in training.
    """

    def __init__(
        self, dim: int, experts: int, *, slots: int = 1, noise: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        embeddings = torch.randn(dim, experts, slots, generator=generator)
        self.embeddings = nn.Parameter(embeddings / dim**0.5)
        self.scale = nn.Parameter(torch.ones(()))
        self.noise = noise

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the mixing of ``tokens`` (images, tokens, dim)."""
        logits = self.logits(tokens)
        if self.training and self.noise > 0:
            logits = logits + self.noise * torch.randn_like(logits)
        return Mixing(logits.softmax(dim=1), logits.softmax(dim=2))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scaled cosines of tokens and slots, (images, tokens, experts x slots)."""
        embeddings = _unit(self.embeddings.flatten(1), dim=0)
        # the scale goes to the smaller factor: fewer products, the same logits
        if tokens.numel() < embeddings.numel():
            return (self.scale * _unit(tokens, dim=-1)) @ embeddings
        return _unit(tokens, dim=-1) @ (self.scale * embeddings)


class ShuffledMixing(nn.Module):
    """The mixing of another token: the control that a router of slots must beat.

    Tokens of an image change places in the mixing of ``router``, always in the same way for as many
    tokens: experts are used as much as before, but for which tokens is left to chance.
    """

    def __init__(self, router: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        self.router, self.seed = router, seed

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the mixing of ``tokens`` (images, tokens, dim), its tokens shuffled."""
        generator = torch.Generator().manual_seed(self.seed)
        count = tokens.shape[1]
        order, other = (torch.randperm(count, generator=generator) for _ in range(2))
        dispatch, combine = self.router(tokens)
        return Mixing(dispatch[:, order.to(tokens.device)], combine[:, other.to(tokens.device)])


class EvenMixing(nn.Module):
    """All slots are the mean of all tokens, and all tokens the mean of all slots: no routing."""

    def __init__(self, slots: int) -> None:
        super().__init__()
        self.n_slots = slots

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the even mixing of ``tokens`` (images, tokens, dim)."""
        images, count, _ = tokens.shape
        ones = tokens.new_ones(1, 1, 1).expand(images, count, self.n_slots)
        return Mixing(ones / count, ones / self.n_slots)


def _unit(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    return x * (x.square().sum(dim=dim, keepdim=True) + EPSILON).rsqrt()
