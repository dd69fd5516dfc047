"""Layers that stay dense, computed in blocks of tokens like those with experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from timm.layers import Mlp

from moee_analysis.counting import tokens_of
from moee_analysis.dispatch import in_blocks
from moee_analysis.layers import all_mlps, replace_module

if TYPE_CHECKING:
    from torch import nn


class BlockedMlp(Mlp):
    """A plain MLP, so many tokens at a time that its hidden activations stay in the cache.

    Its parameters are those of the MLP it is ``of``.
    """

    @classmethod
    def of(cls, mlp: Mlp) -> BlockedMlp:
        """Compute ``mlp`` in blocks; both share their parameters."""
        blocked = cls(1)
        for name, child in mlp.named_children():
            setattr(blocked, name, child)
        return blocked.train(mlp.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., dim) to (..., dim)."""
        blocks = in_blocks(tokens_of(x))
        if len(blocks) == 1:
            return super().forward(x)
        out = torch.cat([super(BlockedMlp, self).forward(block) for block in blocks])
        return out.reshape(*x.shape[:-1], -1)


def compute_in_blocks(model: nn.Module) -> None:
    """Let all MLPs of ``model`` that are dense be computed in blocks of tokens."""
    for name, module in all_mlps(model).items():
        if isinstance(module, Mlp):
            replace_module(model, name, BlockedMlp.of(module))
