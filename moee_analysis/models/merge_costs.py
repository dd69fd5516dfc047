"""What it costs to merge two tokens: which pairs of patches become one in `merging.py`."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize

from moee_analysis.models.attention import leading_attention

Found = tuple[torch.Tensor, torch.Tensor]
"""Costs of merging each patch of row A, the even ones, with each of row B, (images, A, B); and the
weights of tokens in the mean of those that merge, (images, tokens)."""


@dataclass(frozen=True)
class Evidence:
    """What may tell which tokens are alike, in a block after its attention.

    ``x`` (images, tokens, dim) is the residual stream, the first ``leading`` ones are no patches,
    and each stands for ``sizes`` (images, tokens) patches. The ``attention`` has had ``inputs``
    (images, tokens, dim); its ``keys`` (images, heads, tokens, head_dim) are there if asked for.
    """

    x: torch.Tensor
    sizes: torch.Tensor
    leading: int
    attention: nn.Module
    inputs: torch.Tensor
    keys: torch.Tensor | None = None

    @property
    def importance(self) -> torch.Tensor:
        """The attention that the first token, CLS, pays each, mean of heads: (images, tokens)."""
        return leading_attention(self.attention, self.inputs, self.sizes)


class WardCosts(nn.Module):
    """How much merging adds to the squared deviations from the mean, as :func:`ward_costs`.

    With ``by_importance`` the attention of CLS matters too.
    """

    reads_keys = False

    def __init__(self, *, by_importance: bool) -> None:
        super().__init__()
        self.by_importance = by_importance

    def forward(self, seen: Evidence) -> Found:
        """Return costs and weights, these being sizes."""
        paid = seen.importance[:, seen.leading :] if self.by_importance else None
        patches = seen.x[:, seen.leading :], seen.sizes[:, seen.leading :]
        return ward_costs(*patches, paid), seen.sizes


def ward_costs(
    x: torch.Tensor, sizes: torch.Tensor, importance: torch.Tensor | None = None
) -> torch.Tensor:
    """Costs s_a s_b / (s_a + s_b) |x_a - x_b|^2 of pairs of patches (Ward 1963), (images, A, B).

    ``x`` (images, patches, dim) are tokens that stand for ``sizes`` (images, patches) of those
    there were at first. Where their ``importance`` is known, costs are multiplied by its root: that
    of a patch in the one or in the other token, whichever is larger.
    """
    x = x.float()
    a, b = _rows(x)
    of_a, of_b = (each[..., None] for each in _rows(sizes.float()))
    square_a, square_b = (each[..., None] for each in _rows(torch.linalg.vecdot(x, x)))
    far = torch.baddbmm(square_a + square_b.mT, a, b.mT, alpha=-2)
    costs = far.clamp_min(0) / (1 / of_a + 1 / of_b.mT)
    if importance is None:
        return costs
    paid_a, paid_b = (each[..., None] for each in _rows(importance.float() / sizes))
    return costs * torch.maximum(paid_a, paid_b.mT).sqrt()


class KeyCosts(nn.Module):
    """How little the keys of two tokens are alike: less their cosine, over all heads (ToMe).

    With ``by_importance`` tokens count by the attention that CLS pays them, not by the patches they
    stand for, in the mean of those that merge (ToMeCIS, Seol et al., IECON 2023, by its abstract).
    """

    reads_keys = True

    def __init__(self, *, by_importance: bool = False) -> None:
        super().__init__()
        self.by_importance = by_importance

    def forward(self, seen: Evidence) -> Found:
        """Return costs and weights."""
        a, b = _rows(seen.keys[:, :, seen.leading :].transpose(1, 2).flatten(2).float())
        costs = -(normalize(a, dim=2) @ normalize(b, dim=2).mT)
        return costs, seen.importance if self.by_importance else seen.sizes


class RandomCosts(nn.Module):
    """Nothing but chance: the control that any measure must beat.

    Costs are a pseudo-random function of the content of tokens of so many ``dim`` and of the
    ``seed``: any pass over the images repeats them.
    """

    reads_keys = False

    def __init__(self, dim: int, *, seed: int) -> None:
        super().__init__()
        directions = torch.randn(dim, 2, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("directions", directions.double(), persistent=False)

    def forward(self, seen: Evidence) -> Found:
        """Return costs and weights, these being sizes."""
        a, b = _rows(1000 * (seen.x[:, seen.leading :].double() @ self.directions))
        drawn = a[..., :1] + b[..., 1:].mT
        return drawn - drawn.floor(), seen.sizes


def _rows(values: torch.Tensor) -> Found:
    """Those of A and of B."""
    return values[:, ::2], values[:, 1::2]
