"""The best expert for every token, found by computing them all: a bound for routers."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels.dispatch import in_blocks
from moee_analysis.moe.layer import MoeMlp
from moee_analysis.moe.routers import Router, TokenKindRouter


class OracleRouter(Router):
    """Send a token to the expert whose output for it is nearest to that of the dense MLP.

    It computes all that a router should save. The first ``leading`` experts are never chosen, and
    not counted.
    """

    def __init__(self, dense: nn.Module, layer: MoeMlp, *, leading: int = 0) -> None:
        neurons = dense.fc1.out_features + sum(layer.expert_sizes[leading:])
        macs = (layer.fc1.in_features + layer.fc2.out_features) * neurons
        super().__init__(layer.n_experts - leading, macs)
        self._compared = dense, copy.deepcopy(layer)  # in a tuple: not among the model's modules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1)."""
        return self.errors(x).argmin(dim=1, keepdim=True)

    def errors(self, x: torch.Tensor) -> torch.Tensor:
        """Squared error of the output of every expert, (n, experts), for the tokens of ``x``."""
        blocks = zip(in_blocks(tokens_of(x)), in_blocks(tokens_of(self.wanted(x))), strict=True)
        return torch.cat([self._errors(*block) for block in blocks])

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the dense MLP for ``x``.

        Without its hooks: one of them may be what asks (``measure.routes(run.dense(), ...)``).
        """
        return self._compared[0].forward(x)

    def _errors(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        layer = self._compared[1]
        hidden, found = layer.act(layer.fc1(tokens)), []
        for expert in range(layer.n_experts - self.n_experts, layer.n_experts):
            own = layer.expert_neurons(expert)
            shift = 0 if layer.shift is None else layer.shift[expert]
            w2 = layer.fc2.weight.index_select(1, own)
            output = torch.addmm(layer.fc2.bias + shift, hidden.index_select(1, own), w2.T)
            found.append((output - wanted).square().sum(dim=1))
        return torch.stack(found, dim=1)


def oracle_of(dense: nn.Module, layer: MoeMlp) -> OracleRouter:
    """Oracle of the experts of ``layer`` that leading tokens do not have by their position."""
    return OracleRouter(dense, layer, leading=prefix_experts(layer))


def prefix_experts(layer: MoeMlp) -> int:
    """How many experts of ``layer`` leading tokens have by their position."""
    return layer.router.prefix_experts if isinstance(layer.router, TokenKindRouter) else 0


def beside_leading(router: nn.Module, layer: MoeMlp) -> nn.Module:
    """``router`` for the other tokens of ``layer``; leading ones keep their experts."""
    if not isinstance(layer.router, TokenKindRouter):
        return router
    return TokenKindRouter(layer.router.prefix.tolist(), router, tokens=layer.router.tokens)
