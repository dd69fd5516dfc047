"""Experts that are computed together: the more neurons they have in common, the sooner.

One expert after the other computes nothing in vain, in many small products; all experts at once
compute every stored neuron for every token, in one large product. Groups of experts lie between:
all neurons of the group for each of its tokens, then those that the token's expert lacks are set
to zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """Some experts, by number, and the ids of the stored neurons that any of them keeps.

    ``kept`` bool (experts, neurons) says which of the neurons are each expert's own.
    """

    experts: np.ndarray
    neurons: np.ndarray
    kept: np.ndarray


def grouped(kept: np.ndarray, shares: np.ndarray, count: int) -> list[Group]:
    """Put experts into at most ``count`` groups, always joining the two that cost least to join.

    A token costs all neurons of its group. Experts of the same neurons share a group in any case,
    so that there may be fewer groups.

    Parameters
    ----------
    kept
        Neurons of every expert, bool (experts, hidden).
    shares
        Share of the tokens that use each expert, (experts,).
    """
    experts = _alike(kept)
    joined = [np.array(each) for each in _joined(kept, np.asarray(shares, float), experts, count)]
    return [_group(kept, members) for members in joined]


def expected_neurons(groups: list[Group], shares: np.ndarray) -> float:
    """Neurons that are computed for a token, on average over the ``shares`` (experts,)."""
    return float(sum(shares[group.experts].sum() * len(group.neurons) for group in groups))


def _alike(kept: np.ndarray) -> list[list[int]]:
    """Experts of the same neurons, in the order of the first of each."""
    alike: dict[bytes, list[int]] = {}
    for expert, row in enumerate(kept):
        alike.setdefault(row.tobytes(), []).append(expert)
    return list(alike.values())


def _joined(
    kept: np.ndarray, shares: np.ndarray, groups: list[list[int]], count: int
) -> list[list[int]]:
    """Join ``groups`` of experts until there are ``count``."""
    union = np.stack([kept[members[0]] for members in groups])
    share = np.array([shares[members].sum() for members in groups])
    added = np.stack([_added(union, share, group) for group in range(len(groups))])
    while len(groups) > count:
        first, second = sorted(divmod(int(added.argmin()), len(groups)))
        groups[first] += groups.pop(second)
        union[first] |= union[second]
        share[first] += share[second]
        union, share = np.delete(union, second, axis=0), np.delete(share, second)
        added = np.delete(np.delete(added, second, axis=0), second, axis=1)
        added[first] = added[:, first] = _added(union, share, first)
    return groups


def _added(union: np.ndarray, share: np.ndarray, group: int) -> np.ndarray:
    """Neurons per token that joining ``group`` with each of all groups adds; never with itself."""
    apart = share * union.sum(axis=1)
    together = (share + share[group]) * (union | union[group]).sum(axis=1)
    added = together - apart - apart[group]
    added[group] = np.inf
    return added


def _group(kept: np.ndarray, experts: np.ndarray) -> Group:
    neurons = np.flatnonzero(kept[experts].any(axis=0))
    return Group(experts, neurons, kept[np.ix_(experts, neurons)])
