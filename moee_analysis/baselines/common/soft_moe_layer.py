"""Layers whose experts see slots: mixtures of all tokens of an image (Soft MoE and its kin).

Source: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from moee_analysis.baselines.common.expert_mlps import ExpertMlps


class Mixing(NamedTuple):
    """How slots are made of tokens, and tokens of what experts make of the slots.

    Both are (images, tokens, slots): ``dispatch`` sums to 1 over the tokens, ``combine`` over the
    slots. The slots of one expert stand beside each other.
    """

    dispatch: torch.Tensor
    combine: torch.Tensor


class SlotMlp(nn.Module):
    """Experts on slots, in the place of an MLP.

    Parameters
    ----------
    router
        Tokens (images, tokens, dim) -> :class:`Mixing`.
    groups
        Experts in the order of their slots, in groups that differ in their numbers of hidden
        neurons.
    slots
        Slots of each expert.
    drop
        What drops experts in training: outputs (images, experts, slots, dim) -> the same.
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
        made = self.made(tokens, mixing).flatten(1, 2)
        return (mixing.combine @ made).reshape(*x.shape[:-1], made.shape[-1])

    def made(self, tokens: torch.Tensor, mixing: Mixing) -> torch.Tensor:
        """What experts make of their slots of ``tokens``: (images, experts, slots, dim)."""
        slots = (mixing.dispatch.mT @ tokens).unflatten(1, (self.n_experts, self.slots))
        own = slots.split([group.n_experts for group in self.groups], dim=1)
        made = [group(part) for group, part in zip(self.groups, own, strict=True)]
        return self.drop(torch.cat(made, dim=1))

    def usage(self, mixing: Mixing) -> torch.Tensor:
        """Share of the tokens' outputs that comes from each expert, summed over tokens, (experts,).

        It sums to the number of tokens.
        """
        by_slot = mixing.combine.detach().double().sum(dim=(0, 1))
        return by_slot.unflatten(0, (self.n_experts, self.slots)).sum(dim=1)

    def random_router(self, seed: int = 0) -> ShuffledMixing:
        """Return a router that gives every token the mixing of another one."""
        return ShuffledMixing(self.router, seed=seed)

    def constant_router(self) -> EvenMixing:
        """Return a router that mixes all tokens, and all slots, evenly."""
        return EvenMixing(self.n_experts * self.slots)


class ShuffledMixing(nn.Module):
    """The mixing of another token: the control that a router of slots must beat.

    Tokens of an image change places in what ``router`` says of them, always in the same way for as
    many tokens: experts are used as much as before, but what for is left to chance.
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
