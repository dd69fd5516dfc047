"""The one counter of multiply-accumulates (MACs) and of stored parameters.

Counted are matrix products and convolutions: patch embedding, qkv, QK^T, AV, projection, MLPs,
head and routers (1 MAC = 2 FLOPs). Norms, softmax, GELU and biases are not.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.backends import cudnn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating, restored, switched, watch
from moee_analysis.models.loading import blank, find_mlps, unwrapped


@dataclass(frozen=True)
class MacCount:
    """What one image costs: MACs in ``total``, and inside every module that does any.

    ``tokens`` is the number of tokens one image sends through every site, by site name.
    """

    total: int
    by_module: dict[str, int]
    tokens: dict[str, int]

    def replacing(self, per_token: Mapping[str, float]) -> float:
        """MACs of one image if the named sites cost so many MACs per token instead."""
        if unknown := sorted(per_token.keys() - self.tokens):
            expected = f"sites among {', '.join(self.tokens) or 'none'}"
            hint = "name the sites when counting: count(model, sites=[...])"
            raise MoeeError(expected, f"'{unknown[0]}'", hint)
        outside = self.total - sum(self.by_module.get(name, 0) for name in per_token)
        return outside + sum(self.tokens[name] * macs for name, macs in per_token.items())


def count(model: nn.Module, *, sites: Iterable[str] | None = None) -> MacCount:
    """Count the MACs of one image, and the tokens of ``sites``; None: the MLPs of ``find_mlps``."""
    names = [site.name for site in find_mlps(model)] if sites is None else list(sites)
    model = unwrapped(model)
    image, tokens = blank(model), dict.fromkeys(names, 0)
    fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]

    def count_tokens(name: str, x: torch.Tensor) -> None:
        tokens[name] += tokens_of(x).shape[0]

    with (
        evaluating(model),
        watch({name: model.get_submodule(name) for name in names}, count_tokens),
        # fused kernels, and those of cuDNN's LSTMs, count as nothing on some devices
        switched(fused, fused_attn=False),
        sdpa_kernel(SDPBackend.MATH),
        cudnn.flags(enabled=False),
        # the counter trips over parameters that are given to modules and ask for gradients
        switched(model.parameters(), requires_grad=False),
        FlopCounterMode(display=False, custom_mapping=RECURRENT) as counter,
    ):
        model(image)
    root = f"{type(model).__name__}."  # the counter puts it before each name
    by_module = {
        name.removeprefix(root): sum(flops.values()) // 2
        for name, flops in counter.get_flop_counts().items()
        if name.startswith(root)
    }
    return MacCount(counter.get_total_flops() // 2, by_module, tokens)


def moe_macs(model: nn.Module, per_token: Mapping[str, float]) -> float:
    """MACs of one image of a model with routed layers.

    ``per_token`` gives the MACs per token of every routed layer, which does not run, by module
    name: its router plus ``2 d sum_e f_e |S_e|``, with ``f_e`` the measured share of tokens.
    """
    mlps = [model.get_submodule(name) for name in per_token]
    with restored(mlps):  # also a forward that tools which wrap a module have left there
        for mlp in mlps:
            mlp.forward = lambda x, dim=mlp.fc2.out_features: x.new_zeros(*x.shape[:-1], dim)
        return count(model, sites=per_token).replacing(per_token)


def count_parameters(module: nn.Module) -> int:
    """Number of stored floating-point values that are part of the function, shared ones once.

    Lists of integers (which neurons an expert uses) and the record of routing ``shares`` are not.
    """
    function = {
        id(tensor): tensor.numel()
        for name, tensor in module.state_dict(keep_vars=True).items()
        if tensor.is_floating_point() and name.rpartition(".")[2] != "shares"
    }
    return sum(function.values())


def tokens_of(x: torch.Tensor) -> torch.Tensor:
    """Flatten the input of an MLP, [B, tokens, d] or [B, H, W, d], to [B * tokens, d]."""
    return x.reshape(-1, x.shape[-1])


def _lstm_flops(x: Any, inward: Any, across: Any, *_: Any, **__: Any) -> int:
    """FLOPs of an LSTM in one direction, from the shapes of (steps, images, dim) and weights."""
    return 2 * math.prod(x[:2]) * (math.prod(inward) + math.prod(across))


RECURRENT = {torch.ops.aten.mkldnn_rnn_layer: _lstm_flops}  # which the counter does not know
