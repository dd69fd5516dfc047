"""Layers without routing, computed in blocks of tokens like those with experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels.autotune import LITTLE
from moee_analysis.moe.kernels.dispatch import in_blocks
from moee_analysis.moe.kernels.weight_cache import LaidOut
from moee_analysis.moe.layer import all_mlps, moe_layers, moe_names, replace_module
from moee_analysis.utils.matmul import Product, fastest_kernel, is_traced


class BlockedMlp(Mlp):
    """A plain MLP, so many tokens at a time that its hidden activations stay in the cache.

    Its parameters are those of the MLP it is ``of``. Products are oneDNN's where these are faster,
    as in the layers that are routed.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.laid_out = LaidOut()

    @classmethod
    def of(cls, mlp: Mlp) -> BlockedMlp:
        """Compute ``mlp`` in blocks; both share their parameters."""
        blocked = cls(1)
        for name, child in mlp.named_children():
            setattr(blocked, name, child)
        return blocked.train(mlp.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., dim) to (..., dim)."""
        if self._watched():
            return super().forward(x)
        tokens = tokens_of(x)
        compute = self._by_onednn() if self._suits_onednn(tokens) else super().forward
        blocks = in_blocks(tokens)
        out = compute(tokens) if len(blocks) == 1 else torch.cat([*map(compute, blocks)])
        return out.reshape(*x.shape[:-1], self.fc2.out_features)

    def _watched(self) -> bool:
        """Whether hooks look at what is between the products: they see all tokens at once."""
        return any(part._forward_hooks or part._forward_pre_hooks for part in self.children())

    def _suits_onednn(self, tokens: torch.Tensor) -> bool:
        if self.training or is_traced():
            return False
        enough = len(tokens) * self.fc1.weight.numel() * 2 >= LITTLE
        return enough and fastest_kernel(tokens) == "onednn"

    def _by_onednn(self) -> Callable[[torch.Tensor], torch.Tensor]:
        weights = self.fc1.weight, self.fc2.weight
        inward, outward = self.laid_out.get("onednn", weights, lambda: _packed(*weights))
        return lambda x: outward(inward.activated(x, self.fc1.bias, self.act), self.fc2.bias)

    def _apply(self, *args: Any, **kwargs: Any) -> BlockedMlp:
        self.laid_out.clear()  # weights that were moved may stand where others stood before
        return super()._apply(*args, **kwargs)


def compute_in_blocks(model: nn.Module) -> None:
    """Let all MLPs of ``model`` that are dense be computed in blocks of tokens."""
    for name, module in all_mlps(model).items():
        if isinstance(module, Mlp):
            replace_module(model, name, BlockedMlp.of(module))


def without_routing(model: nn.Module) -> nn.Module:
    """Return a copy of a statically pruned model whose layers of one expert are MLPs in blocks."""
    model = copy.deepcopy(model)
    names = moe_names(model)
    for index, layer in moe_layers(model).items():
        if layer.n_experts == 1:
            mlp = BlockedMlp(1)
            mlp.fc1, mlp.act, mlp.fc2 = layer.fc1, layer.act, layer.fc2
            if layer.shift is not None:
                mlp.fc2.bias.data += layer.shift.data[0]
            replace_module(model, names[index], mlp)
    return model


def _packed(*weights: torch.Tensor) -> list[Product]:
    return [Product.of(weight, "onednn", packed=True) for weight in weights]
