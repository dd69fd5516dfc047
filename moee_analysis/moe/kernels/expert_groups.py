"""Experts that are computed together: the more neurons they share, the less that costs.

One expert after the other computes nothing in vain, in many small products; all experts at once
compute every stored neuron for every token, in one large product. Groups of experts lie between:
all neurons of the group for each of its tokens, then zeros for those that the token's expert lacks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise

import numpy as np
import torch
from torch.nn.functional import pad

ALIGNED = 16  # neurons: torch's grouped products want rows of whole 16 bytes


@dataclass(frozen=True)
class Group:
    """Experts ``start`` to ``stop`` of the groups' order, and all ``neurons`` that they keep.

    ``kept`` (experts, neurons) is 1 for an expert's own, else 0; ``uniform``: all are its own.
    """

    start: int
    stop: int
    neurons: torch.Tensor
    kept: torch.Tensor
    uniform: bool


@dataclass(frozen=True)
class Padded:
    """All groups at one width, filled up with neurons that none of their experts keeps.

    ``neurons`` (groups, width); by place in the groups' order ``kept`` (experts, width) and
    ``group`` (experts,); ``stops`` (groups,): the places where groups end.
    """

    neurons: torch.Tensor
    kept: torch.Tensor
    group: torch.Tensor
    stops: torch.Tensor


@dataclass(frozen=True)
class ExpertGroups:
    """A layer's experts in groups; ``order`` has them group after group, ``place`` inverts it."""

    groups: tuple[Group, ...]
    order: torch.Tensor
    place: torch.Tensor

    @cached_property
    def padded(self) -> Padded:
        """The groups as tensors of one width, for products of all groups at once."""
        widest = max(1, *(len(group.neurons) for group in self.groups))
        width = -(-widest // ALIGNED) * ALIGNED
        with torch.inference_mode(mode=False):  # what inference has made serves training too
            sizes = self.order.new_tensor([group.stop - group.start for group in self.groups])
            return Padded(
                torch.stack([pad(g.neurons, (0, width - len(g.neurons))) for g in self.groups]),
                torch.cat([pad(g.kept, (0, width - len(g.neurons))) for g in self.groups]),
                torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes),
                sizes.cumsum(0),
            )


def group_experts(kept: torch.Tensor, shares: torch.Tensor, count: int | None) -> ExpertGroups:
    """Put experts into ``count`` groups at most; None: every expert by itself.

    Parameters
    ----------
    kept
        1 for the neurons of an expert, else 0, (experts, hidden).
    shares
        Share of the tokens that use each expert, (experts,).
    """
    table, device = (kept > 0).cpu().numpy(), kept.device
    members = join_experts(table, shares.double().cpu().numpy(), count or len(table))
    stops = accumulate(map(len, members), initial=0)
    with torch.inference_mode(mode=False):  # what inference has made serves training too
        order = torch.tensor([*chain(*members)], device=device)
        groups = [_group(kept, order, *ends) for ends in pairwise(stops)]
        return ExpertGroups(tuple(groups), order, order.argsort())


def join_experts(kept: np.ndarray, shares: np.ndarray, count: int) -> list[list[int]]:
    """Join experts until there are ``count`` groups, always the two that cost least to join.

    A token costs all neurons of its group. Experts of the same neurons share a group in any case,
    so that there may be fewer.
    """
    alike: dict[bytes, list[int]] = {}
    for expert, row in enumerate(kept):
        alike.setdefault(row.tobytes(), []).append(expert)
    groups = list(alike.values())
    union = np.stack([kept[members[0]] for members in groups])
    share = np.array([shares[members].sum() for members in groups])
    while len(groups) > count:
        cost = _joining_cost(union, share)
        first, second = sorted(divmod(int(cost.argmin()), len(groups)))
        groups[first] += groups.pop(second)
        union[first] |= union[second]
        share[first] += share[second]
        union, share = np.delete(union, second, axis=0), np.delete(share, second)
    return groups


def _joining_cost(union: np.ndarray, share: np.ndarray) -> np.ndarray:
    """Neurons per token that joining two groups adds, (groups, groups); inf with itself."""
    size, table = union.sum(axis=1), union.astype(np.float32)
    both = size[:, None] + size - table @ table.T
    apart = share * size
    cost = (share[:, None] + share) * both - apart - apart[:, None]
    np.fill_diagonal(cost, np.inf)
    return cost


def _group(kept: torch.Tensor, order: torch.Tensor, start: int, stop: int) -> Group:
    members = kept[order[start:stop]]
    neurons = members.any(dim=0).nonzero()[:, 0]
    own = members[:, neurons]
    return Group(start, stop, neurons, own, uniform=bool(own.all()))
