"""What it costs to merge two tokens of an image: the measures of :mod:`merging`'s pairs."""

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Evidence:
    """What may tell which tokens are alike, in a block after its attention.

    ``x`` (images, tokens, dim) is the residual stream; tokens stand for ``sizes`` (images, tokens)
    patches. Of the attention, where they are asked for, ``importance`` (images, tokens), that which
    the first token pays each, and ``keys`` (images, heads, tokens, head_dim).
    """

    x: torch.Tensor
    sizes: torch.Tensor
    importance: torch.Tensor | None = None
    keys: torch.Tensor | None = None

    def after(self, leading: int) -> Self:
        """That of all but the ``leading`` tokens."""
        paid = None if self.importance is None else self.importance[:, leading:]
        keys = None if self.keys is None else self.keys[:, :, leading:]
        return type(self)(self.x[:, leading:], self.sizes[:, leading:], paid, keys)


class MergeCosts(nn.Module):
    """Costs of merging each patch of A, the even ones, with each of B, (images, A, B).

    ``reads_importance`` and ``reads_keys`` say what of the :class:`Evidence` is needed.
    """

    reads_importance = False
    reads_keys = False

    def weights(self, evidence: Evidence) -> torch.Tensor:
        """What tokens count in the mean of those that merge, (images, tokens)."""
        return evidence.sizes


class WardCosts(MergeCosts):
    """How much merging adds to the squared deviations from the mean (Ward 1963).

    That is s_a s_b / (s_a + s_b) |x_a - x_b|^2 for tokens that stand for s patches. Where CLS reads
    the patches (``by_importance``) it is multiplied by the root of the attention that CLS pays a
    patch of the one or of the other, whichever gets more.
    """

    def __init__(self, *, by_importance: bool) -> None:
        super().__init__()
        self.reads_importance = by_importance

    def forward(self, seen: Evidence) -> torch.Tensor:
        """Return the costs of all pairs."""
        a, b = _rows(seen.x.float())
        of_a, of_b = (sizes[..., None] for sizes in _rows(seen.sizes.float()))
        far = a.square().sum(dim=2)[..., None] - 2 * a @ b.mT + b.square().sum(dim=2)[:, None]
        costs = far.clamp_min(0) / (1 / of_a + 1 / of_b.mT)
        if seen.importance is None:
            return costs
        paid, to_b = (each[..., None] for each in _rows(seen.importance.float() / seen.sizes))
        return costs * torch.maximum(paid, to_b.mT).sqrt()


class KeyCosts(MergeCosts):
    """How little the keys of two tokens are alike: less their cosine, over all heads (ToMe).

    ``by_importance``: tokens count by the attention that CLS pays them, not by the patches they
    stand for, in the mean of those that merge (ToMeCIS, Seol et al., IECON 2023, by its abstract).
    """

    reads_keys = True

    def __init__(self, *, by_importance: bool = False) -> None:
        super().__init__()
        self.reads_importance = by_importance

    def forward(self, seen: Evidence) -> torch.Tensor:
        """Return the costs of all pairs."""
        a, b = _rows(normalize(seen.keys.transpose(1, 2).flatten(2).float(), dim=2))
        return -(a @ b.mT)

    def weights(self, evidence: Evidence) -> torch.Tensor:
        """The attention that CLS pays, where it counts; else the patches."""
        return evidence.importance if self.reads_importance else evidence.sizes


class RandomCosts(MergeCosts):
    """Nothing but chance: the control that any measure must beat.

    Costs are a pseudo-random function of the content of tokens and of the ``seed``: any pass over
    the images repeats them.
    """

    def __init__(self, dim: int, *, seed: int) -> None:
        super().__init__()
        directions = torch.randn(dim, 2, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("directions", directions.double(), persistent=False)

    def forward(self, seen: Evidence) -> torch.Tensor:
        """Return the costs of all pairs."""
        a, b = _rows(1000 * (seen.x.double() @ self.directions))
        drawn = a[..., :1] + b[..., 1:].mT
        return drawn - drawn.floor()


def _rows(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of A and of B."""
    return values[:, ::2], values[:, 1::2]
