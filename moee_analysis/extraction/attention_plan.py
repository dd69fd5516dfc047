"""Attention as an optional stage: candidates for the one budget, and the heads that are chosen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.attention_modes import AttentionModes, Modes, attention_modes
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.lagrangian import Candidates
from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.models.attention import (
    AttentionSite,
    Factors,
    Reduction,
    find_attentions,
    low_rank,
    plain_attentions,
)
from moee_analysis.models.macs import MacCount
from moee_analysis.moe.layer import replace_module

STEP = 8  # modes of a head: kernels are no faster for ranks between its multiples
KeptModes = tuple[np.ndarray, np.ndarray]  # scores and values, bool (heads, head_dim)


@dataclass(frozen=True)
class AttentionPlan:
    """An attention before the ranks of its heads are chosen.

    Of its ``tokens`` only the outputs of the first ``queries`` are read; None: of all. ``modes`` is
    None where the heads keep all dimensions; ``bias`` says whether its queries have one.
    """

    site: AttentionSite
    tokens: int
    queries: int | None
    bias: bool
    modes: AttentionModes | None = None

    def macs(self, kept: KeptModes | None) -> int:
        """MACs of one image with the ``kept`` scores and values; None: with all."""
        dimensions = 2 * self.site.heads * self.site.head_dim
        if kept is not None:
            dimensions = sum(int(each.sum()) for each in kept)
        return dimensions * self._macs

    @property
    def fixed_macs(self) -> int:
        """MACs of one image that no choice of modes changes."""
        return 0 if self.modes else self.macs(None)

    @property
    def fixed_parameters(self) -> int:
        """Parameters that no choice of modes changes: the output's bias, or all."""
        dimensions = 0 if self.modes else self.site.heads * self.site.head_dim
        return self.site.dim + dimensions * sum(self._parameters)

    def candidates(self) -> list[Candidates]:
        """Blocks of modes that may be kept, of the scores and of the values, the best ones first.

        A block is the next few best modes of every head, for heads of one rank are computed
        together.
        """
        found, size = [], self._step * self.site.heads
        kinds = (self.modes.scores, self.modes.values)
        for modes, parameters in zip(kinds, self._parameters, strict=True):
            best_first = -np.sort(-modes.costs, axis=1)
            costs = best_first.sum(axis=0).reshape(1, -1, self._step).sum(axis=2)
            found.append(Candidates(costs, np.ones(1), size * self._macs, size * parameters))
        return found

    def in_heads(self, scores: np.ndarray, values: np.ndarray) -> KeptModes:
        """Modes of so many blocks, bool (1, blocks); no scores where values are gone."""

        def best(modes: Modes, blocks: int) -> np.ndarray:
            place = np.argsort(np.argsort(-modes.costs, axis=1, kind="stable"), axis=1)
            return place < blocks * self._step

        asked = int(scores.sum()) if values.any() else 0
        return best(self.modes.scores, asked), best(self.modes.values, int(values.sum()))

    def reduction(self, kept: KeptModes | None) -> Reduction:
        """The attention of the ``kept`` scores and values; None: of all."""
        if kept is None:
            identity = Factors.whole(self.site)
            mean = torch.zeros(self.site.heads, self.site.head_dim)
            return Reduction(identity, identity, mean, self.queries)
        scores, values = self.modes.scores.factors(kept[0]), self.modes.values.factors(kept[1])
        return Reduction(scores, values, self.modes.mean, self.queries)

    @property
    def _macs(self) -> int:
        """MACs of one image for a dimension of a head's scores; one of its values costs the same.

        Queries and keys (or values and outputs) are made of every token, then compared in pairs.
        """
        asked = self.queries or self.tokens
        return self.site.dim * (asked + self.tokens) + asked * self.tokens

    @property
    def _parameters(self) -> tuple[int, int]:
        """Parameters that a dimension of the scores stores, and one of the values."""
        return 2 * self.site.dim + self.bias, 2 * self.site.dim

    @property
    def _step(self) -> int:
        """Modes that a head gets at a time."""
        return gcd(STEP, self.site.head_dim)


def plan_attentions(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, dense: MacCount, root: Path
) -> list[AttentionPlan]:
    """Plan the attentions of ``config``: none, those with unread outputs, or all.

    ``dense`` has counted the tokens of all plain attentions.
    """
    if config.attention == "dense":
        return []
    cut = config.attention == "low_rank"
    sites = (find_attentions if cut else plain_attentions)(model)
    if not sites:
        return []
    unread = unread_patches(model, sites)
    leading = leading_kinds(model, [site.name for site in sites])
    queries = {n: len(kinds) or None if n in unread else None for n, kinds in leading.items()}
    modes = {}
    if cut:
        modes = attention_modes(model, images, queries, seed=config.seed, root=root)
    return [
        AttentionPlan(
            site, dense.tokens[site.name], queries[site.name],
            bias=site.module(model).qkv.bias is not None, modes=modes.get(site.name),
        )
        for site in sites
        if site.name in unread or site.name in modes
    ]  # fmt: skip


def reduce_attention(
    model: nn.Module, plans: Sequence[AttentionPlan], kept: Mapping[str, KeptModes]
) -> None:
    """Put the planned attentions of the ``kept`` modes in the place of the model's own."""
    for plan in plans:
        dense = plan.site.module(model)
        reduction = plan.reduction(kept.get(plan.site.name))
        replace_module(model, plan.site.name, low_rank(plan.site, dense, reduction))
