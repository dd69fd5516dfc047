"""MACs that are spent on outputs that nothing reads, of any model: dense, routed or pruned.

After the last block of a ViT whose head reads the CLS token alone, nothing reads the patches: their
MLP there is spent on nothing, and so are their queries, scores, sums of values and projections in
the attention before it (their keys and values are read). Saving these loses nothing, with experts
or without, so they are counted apart, for every model alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import nn

from moee_analysis.extraction.record.token_kinds import leading_kinds, unread_kinds
from moee_analysis.models.attention import LowRankAttention
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import MoeMlp
from moee_analysis.moe.routers import TokenKindRouter

ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention)
LAYERS = (Mlp, GluMlp, SwiGLU, MoeMlp, LowRankAttention, *ATTENTIONS)


@dataclass(frozen=True)
class UnreadMacs:
    """MACs of one image that a layer spends on tokens whose outputs nothing reads.

    ``kinds`` are those of the tokens, such as ("register", "patch"); ``now`` is what the layer
    spends as it is, ``dense`` what it did before it was taken apart or cut down.
    """

    kinds: tuple[str, ...]
    dense: float
    now: float


def unread_macs(
    model: nn.Module, *, shares: Mapping[str, torch.Tensor] | None = None
) -> dict[str, UnreadMacs]:
    """Return what the layers of ``model`` spend on tokens that nothing reads, by module name.

    Only MLPs and attentions (of :data:`LAYERS`) with such tokens are there: none in a network of
    patches alone. Of
    routed layers, tokens with experts of their own are told from others; where all are routed
    alike, each costs what a token does on average.

    ``shares``: measured routing shares (experts,) of routed layers, by module name; others have
      those of the calibration.

    Raises MoeeError: what ``prefix_kinds`` refuses.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    leading = {name: kinds for name, kinds in leading_kinds(model, names).items() if kinds}
    if not leading:
        return {}
    counted, found = count(model, sites=leading), {}
    unread = unread_kinds(model, [_Place(name) for name in leading])
    for name, kinds in unread.items():
        if kinds:
            layer, tokens = model.get_submodule(name), counted.tokens[name]
            seen = _Seen(tokens, tuple(kind in kinds for kind in leading[name]), "patch" in kinds)
            each = counted.by_module.get(name, 0) / tokens
            found[name] = UnreadMacs(kinds, *_spent(layer, seen, each, (shares or {}).get(name)))
    return found


@dataclass(frozen=True)
class _Place:
    """A module by its name."""

    name: str

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name)


@dataclass(frozen=True)
class _Seen:
    """How many tokens of one image a layer sees, and which of them nothing reads."""

    tokens: int
    leading: tuple[bool, ...]
    patches: bool

    @property
    def unread(self) -> int:
        return self.unread_among(self.tokens)

    def unread_among(self, first: int) -> int:
        """Tokens that nothing reads among the first ones."""
        patches = max(0, first - len(self.leading)) if self.patches else 0
        return sum(self.leading[:first]) + patches


def _spent(
    layer: nn.Module, seen: _Seen, each: float, shares: torch.Tensor | None
) -> tuple[float, float]:
    """MACs for tokens that nothing reads, dense and now; ``each`` token of others costs as much."""
    if isinstance(layer, MoeMlp):
        return _of_experts(layer, seen, shares)
    if isinstance(layer, LowRankAttention):
        return _of_low_rank(layer, seen)
    if isinstance(layer, ATTENTIONS):  # queries and scores, values and projections
        width = 2 * layer.proj.in_features
        macs = seen.unread * width * (layer.proj.out_features + seen.tokens)
        return macs, macs
    return seen.unread * each, seen.unread * each


def _of_experts(layer: MoeMlp, seen: _Seen, shares: torch.Tensor | None) -> tuple[float, float]:
    ends = layer.fc1.in_features + layer.fc2.out_features
    dense, total = (
        seen.unread * ends * layer.hidden_dense,
        seen.tokens * layer.macs_per_token(shares),
    )
    if not isinstance(layer.router, TokenKindRouter):
        return dense, total * seen.unread / seen.tokens
    own = [ends * layer.expert_sizes[expert] for expert in layer.router.prefix.tolist()]
    now = sum(macs for macs, unread in zip(own, seen.leading, strict=True) if unread)
    return dense, now + (total - sum(own) if seen.patches else 0)


def _of_low_rank(attention: LowRankAttention, seen: _Seen) -> tuple[float, float]:
    site, ranks = attention.site, attention.ranks
    asked = seen.tokens if ranks.queries is None else ranks.queries
    each = site.heads * (site.dim + seen.tokens)  # MACs of a token for a dimension of the heads
    now = seen.unread_among(asked) * each * (ranks.scores + ranks.values)
    return seen.unread * each * 2 * site.head_dim, now
