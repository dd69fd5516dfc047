"""Soft MoE: every slot is a mixture of all tokens of an image, every token one of all slots.

Sources: Puigcerver et al., "From Sparse to Soft Mixtures of Experts", arXiv:2308.00951 (the router
of its algorithms 1 and 2); SpheroMoE: Zhu et al., "MoE Jetpack", NeurIPS 2024, section 3.3, and its
released code where the paper leaves something open.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import normalize

from moee_analysis.baselines.common.exchange import ExpertMlps, add_noise

EPSILON = 1e-6  # added to squared lengths


class Mixing(NamedTuple):
    """How slots are made of tokens, and tokens of the outputs for slots; (images, tokens, slots).

    ``dispatch`` sums to 1 over the tokens, ``combine`` over the slots, one expert's side by side.
    """

    dispatch: torch.Tensor
    combine: torch.Tensor


class SlotMlp(nn.Module):
    """Experts on slots, in the place of an MLP.

    ``router`` makes a :class:`Mixing` of tokens (images, tokens, dim). Experts stand in the order
    of their slots, so many of each, in ``groups`` of one number of hidden neurons. ``drop`` is the
    rate at which whole experts drop out in training.
    """

    def __init__(
        self, router: nn.Module, groups: Sequence[ExpertMlps], *, slots: int = 1, drop: float = 0.0
    ) -> None:
        super().__init__()
        self.router, self.groups, self.slots = router, nn.ModuleList(groups), slots
        self.drop = ExpertDropout(drop)

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
        """Share of the tokens' outputs that comes from each expert, sum over tokens, (experts,)."""
        by_slot = mixing.combine.detach().double().sum(dim=(0, 1))
        return by_slot.unflatten(0, (self.n_experts, self.slots)).sum(dim=1)

    def random_router(self, seed: int = 0) -> "ShuffledMixing":
        """Return a router that gives every token the mixing of another one."""
        return ShuffledMixing(self.router, seed=seed)

    def constant_router(self) -> "EvenMixing":
        """Return a router that mixes all tokens, and all slots, evenly."""
        return EvenMixing(self.n_experts * self.slots)


class SoftRouter(nn.Module):
    """Dispatch by a softmax over the tokens, and combine by one over all slots.

    Logits are cosines with the ``embeddings`` (dim, experts, slots), drawn from N(0, 1 / dim) by
    the ``seed``, times ``scale``; both are learned. ``noise`` is a standard deviation, in training.
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
        logits = add_noise(self.logits(tokens), self)
        return Mixing(logits.softmax(dim=1), logits.softmax(dim=2))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return scaled cosines of tokens and slots, (images, tokens, experts x slots)."""
        embeddings = _unit(self.embeddings.flatten(1), dim=0)
        # the scale goes to the smaller factor: fewer products, the same logits
        if tokens.numel() < embeddings.numel():
            return (self.scale * _unit(tokens, dim=-1)) @ embeddings
        return _unit(tokens, dim=-1) @ (self.scale * embeddings)


def _unit(x: torch.Tensor, *, dim: int) -> torch.Tensor:
    return x * (x.square().sum(dim=dim, keepdim=True) + EPSILON).rsqrt()


class SpheroRouter(nn.Module):
    """Dispatch and combine by the directions of tokens and of learned queries.

    ``queries`` (experts, slots, dim) start orthogonal, as far as there are dimensions, and are
    normed like tokens (``query_norm``). Logits are cosines, to dispatch divided by a temperature
    and softmaxed over the tokens, to combine by another one and over all slots. All are learned.

    - ``temperature``: both at the start.
    - ``noise``: standard deviation of what is added to the logits, in training alone (the released
      code adds it in evaluation too); None is one over the number of experts.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        *,
        slots: int = 1,
        temperature: float = 0.5,
        noise: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        queries = nn.init.orthogonal_(torch.empty(experts, slots * dim), generator=generator)
        self.queries = nn.Parameter(queries.unflatten(1, (slots, dim)).contiguous())
        self.query_norm = nn.LayerNorm(dim)
        self.dispatch_temperature = nn.Parameter(torch.tensor(temperature))
        self.combine_temperature = nn.Parameter(torch.tensor(temperature))
        self.noise = 1 / experts if noise is None else noise

    def forward(self, tokens: torch.Tensor) -> Mixing:
        """Return the mixing of ``tokens`` (images, tokens, dim)."""
        logits = add_noise(self.logits(tokens), self)
        dispatch = (logits / self.dispatch_temperature).softmax(dim=1)
        return Mixing(dispatch, (logits / self.combine_temperature).softmax(dim=2))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return cosines of tokens and queries, (images, tokens, experts x slots)."""
        queries = normalize(self.query_norm(self.queries.flatten(0, 1)), dim=1)
        return (normalize(tokens, dim=2) @ queries.T).to(self.queries.dtype)  # autocast lowers it


class ExpertDropout(nn.Module):
    """Outputs of experts drop out in training at a ``rate``; the others grow as much in turn."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return ``outputs`` (images, experts, slots, dim), those that drop out zero."""
        if not self.training or not self.rate:
            return outputs
        staying = outputs.new_empty(*outputs.shape[:2], 1, 1).bernoulli_(1 - self.rate)
        return outputs * staying / (1 - self.rate)


class ShuffledMixing(nn.Module):
    """The mixing of another token: the control that a router of slots must beat.

    Which one is left to chance, always in the same way for as many tokens of an image.
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
