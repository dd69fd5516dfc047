"""MACs that are spent on outputs that nothing reads, of any model: dense, routed or pruned.

After the last block of a ViT whose head reads the CLS token alone, nothing reads the patches: their
MLP there is spent on nothing, and so are their queries, scores, sums of values and projections in
the attention before it (their keys and values are read). Saving these loses nothing, with experts
or without, so they are counted apart, for every model alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
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
    patches alone. Of routed layers, tokens with experts of their own are told from others; where
    all are routed alike, each costs what a token does on average. ``shares`` are measured routing
    shares (experts,) of routed layers, by module name; others have those of the calibration.
    Raises MoeeError: what ``prefix_kinds`` refuses.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    leading = {name: kinds for name, kinds in leading_kinds(model, names).items() if kinds}
    if not leading:
        return {}
    counted, found = count(model, sites=leading), {}
    for name, kinds in unread_kinds(model, [_Place(name) for name in leading]).items():
        if kinds:
            patches = counted.tokens[name] - len(leading[name])
            all_kinds = [*leading[name], *["patch"] * patches]
            unread = np.array([kind in kinds for kind in all_kinds])
            each = counted.by_module.get(name, 0) / len(unread)
            layer, share = model.get_submodule(name), (shares or {}).get(name)
            found[name] = UnreadMacs(kinds, *_spent(layer, unread, each, share))
    return found


@dataclass(frozen=True)
class _Place:
    """A module by its name."""

    name: str

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name)


def _spent(
    layer: nn.Module, unread: np.ndarray, each: float, shares: torch.Tensor | None
) -> tuple[float, float]:
    """MACs for the tokens (bool) that nothing reads, dense and now; ``each`` token of others."""
    tokens, wasted = len(unread), int(unread.sum())
    if isinstance(layer, MoeMlp):
        return _of_experts(layer, unread, shares)
    if isinstance(layer, LowRankAttention):
        site, ranks = layer.site, layer.ranks
        each = site.heads * (site.dim + tokens)  # MACs of a token for a dimension of the heads
        asked = int(unread[: ranks.queries].sum())
        return wasted * each * 2 * site.head_dim, asked * each * (ranks.scores + ranks.values)
    if isinstance(layer, ATTENTIONS):  # queries and scores, values and projections
        each = 2 * layer.proj.in_features * (layer.proj.out_features + tokens)
    return wasted * each, wasted * each


def _of_experts(
    layer: MoeMlp, unread: np.ndarray, shares: torch.Tensor | None
) -> tuple[float, float]:
    ends, wasted = layer.fc1.in_features + layer.fc2.out_features, int(unread.sum())
    dense, total = wasted * ends * layer.hidden_dense, len(unread) * layer.macs_per_token(shares)
    if not isinstance(layer.router, TokenKindRouter):
        return dense, total * wasted / len(unread)
    own = [ends * layer.expert_sizes[expert] for expert in layer.router.prefix.tolist()]
    now = sum(macs for macs, waste in zip(own, unread, strict=False) if waste)
    return dense, now + (total - sum(own) if unread[len(own) :].any() else 0)
