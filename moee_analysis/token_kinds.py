"""Tokens are not all alike: what the leading ones are, and whose outputs nothing reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moee_analysis.activations import prefix_tokens
from moee_analysis.errors import MoeeError
from moee_analysis.models import find_mlps, input_size
from moee_analysis.sensitivity import output_gradients

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moee_analysis.attention import AttentionSite
    from moee_analysis.models import MlpSite

PREFIX_KINDS = {"cls_token": "cls", "dist_token": "dist", "reg_token": "register"}
"""Kind of the tokens in timm's parameters of these names, in the order in which they stand."""


def prefix_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the kind of every leading token: "cls", "dist" or "register", in their order.

    The order is that of timm's ``_pos_embed``: class, then distillation or register tokens, then
    patches. Empty for a model of patches alone.

    Raises
    ------
    MoeeError
        The model's own parameters are not as many tokens as its ``num_prefix_tokens``.
    """
    expected = prefix_tokens(model)
    if expected == 0:
        return ()
    own = {name.rpartition(".")[2]: len(p[0]) for name, p in model.named_parameters() if p.ndim > 2}
    kinds = [kind for name, kind in PREFIX_KINDS.items() for _ in range(own.get(name, 0))]
    if len(kinds) != expected:
        raise MoeeError(
            f"{expected} leading tokens, as num_prefix_tokens says",
            f"{', '.join(kinds) or 'none'} among the parameters of {type(model).__name__}",
            f"use a model whose leading tokens are timm's {', '.join(PREFIX_KINDS)}",
        )
    return tuple(kinds)


def unread_patches(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None = None
) -> frozenset[str]:
    """Return the names of the ``sites`` whose outputs at the patches nothing reads any more.

    There the gradient of the logits is exactly zero at every patch of a random image: the last
    block of a ViT whose head reads the CLS token alone. An MLP that gets no patches is one of
    them. ``sites`` None: all MLPs.

    Raises
    ------
    MoeeError
        The model has no MLPs, or a site that :func:`output_gradients` refuses.
    """
    like = next(model.parameters())
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    sites = find_mlps(model) if sites is None else sites
    gradients = output_gradients(model, sites, image.to(like), seeds=[(0, 0)], probes=1)
    prefix = prefix_tokens(model)
    return frozenset(name for name, g in gradients.items() if not g[:, :, prefix:].any())
