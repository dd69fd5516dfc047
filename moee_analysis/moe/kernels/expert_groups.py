"""Experts that are computed together: the more neurons they share, the less that costs.

One expert after the other computes nothing in vain, in many small products; all experts at once
compute every stored neuron for every token, in one large product. Groups of experts lie between:
all neurons of the group for each of its tokens, then zeros for those that the token's expert lacks.
"""

from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch.nn.functional import pad

ALIGNED = 16  # neurons: torch's grouped products want rows of whole 16 bytes


@dataclass(frozen=True)
class ExpertGroups:
    """A layer's experts in groups; a place is that of an expert with one group after the other.

    ``order`` (experts,) are the experts by place, ``place`` (experts,) their places, ``group``
    (experts,) the groups by place and ``stops`` (groups,) the places where groups end. ``neurons``
    (groups, width) are those that any expert of the group keeps, as many as ``widths`` says, then
    others; ``kept`` (experts, width) is 1 by place for those that the expert keeps, else 0.
    ``uniform``: all experts of the group keep the same.
    """

    order: torch.Tensor
    place: torch.Tensor
    group: torch.Tensor
    stops: torch.Tensor
    neurons: torch.Tensor
    kept: torch.Tensor
    widths: list[int]
    uniform: list[bool]


def group_experts(kept: torch.Tensor, shares: torch.Tensor, count: int | None) -> ExpertGroups:
    """Put experts into ``count`` groups at most; None: every expert by itself.

    ``kept`` (experts, hidden) is 1 for the neurons of an expert, else 0; ``shares`` (experts,) are
    those of the tokens that use it.
    """
    table = (kept > 0).cpu().numpy()
    members = join_experts(table, shares.double().cpu().numpy(), count or len(table))
    with torch.inference_mode(mode=False):  # what inference has made serves training too
        order = torch.tensor([*chain(*members)], device=kept.device)
        sizes = torch.tensor([*map(len, members)], device=kept.device)
        group = torch.arange(len(sizes), device=kept.device).repeat_interleave(sizes)
        union = kept.new_zeros(len(sizes), kept.shape[1]).index_add(0, group, kept[order]) > 0
        widths, own = union.sum(dim=1), (kept[order] > 0).sum(dim=1)
        neurons = union.int().argsort(dim=1, descending=True, stable=True)[:, : widths.max()]
        lacking = kept.new_zeros(len(sizes)).index_add(0, group, (widths[group] - own).to(kept))
        filling = 0, -neurons.shape[1] % ALIGNED
        return ExpertGroups(
            order, order.argsort(), group, sizes.cumsum(0), pad(neurons, filling),
            pad(kept[order].gather(1, neurons[group]), filling), widths.tolist(),
            (lacking == 0).tolist(),
        )  # fmt: skip


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
