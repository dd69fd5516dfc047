"""The MoE layer: an MLP whose tokens each use the hidden neurons of their own expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from moee_analysis.models import is_plain_mlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from timm.layers import Mlp


class MoeMlp(nn.Module):
    """Experts cut out of one dense MLP, and the router that chooses among them.

    Experts may share hidden neurons. The rows of W1 and columns of W2 that any expert uses are
    stored once, in ``fc1`` and ``fc2``; each expert is a list of indices into them. Neurons that
    no expert uses are gone. The output is b2 plus the sum over the token's experts, so a
    layer whose every expert keeps all neurons is the dense MLP when each token has one expert.

    Parameters
    ----------
    mlp
        The dense ``timm.layers.Mlp`` to cut from.
    router
        Tokens (n, dim) -> expert ids, int64 (n, k).
    experts
        Sorted ids of the dense hidden neurons that each expert keeps.
    shares
        Share of the calibration tokens that use each expert, (experts,); sums to k.
    """

    def __init__(
        self, mlp: Mlp, router: nn.Module, experts: Sequence[np.ndarray], shares: np.ndarray
    ) -> None:
        super().__init__()
        ids = [torch.as_tensor(ids, dtype=torch.int64) for ids in experts]
        union = torch.unique(torch.cat(ids))
        self.hidden_dense = mlp.fc1.out_features
        self.fc1 = _rows_of(mlp.fc1, union)
        self.act = mlp.act
        self.fc2 = _columns_of(mlp.fc2, union)
        self.router = router
        self.register_buffer("kept", union)
        self.register_buffer("neurons", torch.cat([torch.searchsorted(union, i) for i in ids]))
        self.register_buffer("sizes", torch.tensor([len(i) for i in ids]))
        self.register_buffer("shares", torch.as_tensor(shares, dtype=torch.float32))

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.sizes)

    @property
    def expert_sizes(self) -> list[int]:
        """Hidden neurons of each expert."""
        return self.sizes.tolist()

    def expert_neurons(self, expert: int) -> torch.Tensor:
        """Indices of the expert's neurons among the layer's stored neurons, ascending."""
        start = int(self.sizes[:expert].sum())
        return self.neurons[start : start + int(self.sizes[expert])]

    def macs_per_token(self, shares: torch.Tensor | None = None) -> float:
        """Expected MACs of one token: the router, and 2 d |S_e| weighted by how often e is used.

        ``shares`` (experts,) are measured routing shares; None takes the calibration's.
        """
        shares = self.shares if shares is None else shares.to(self.sizes.device)
        neurons = torch.dot(shares.double(), self.sizes.double()).item()
        dim = self.fc1.in_features + self.fc2.out_features
        return self.router.macs + dim * neurons

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., dim) to (..., dim), one expert after the other."""
        tokens = x.reshape(-1, x.shape[-1])
        chosen = self.router(tokens)
        flat = chosen.flatten()
        rows = flat.argsort(stable=True) // chosen.shape[1]
        met = rows.split(flat.bincount(minlength=self.n_experts).tolist())
        parts = [self._expert(tokens[part], expert) for expert, part in enumerate(met)]
        out = self.fc2.bias.expand(len(tokens), -1).clone()
        # under autocast the products are of a lower precision than the bias
        out.index_add_(0, rows, torch.cat(parts).to(out.dtype))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _expert(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        """Output of one expert without the output bias."""
        ids = self.expert_neurons(expert)
        bias = None if self.fc1.bias is None else self.fc1.bias[ids]
        hidden = self.act(nn.functional.linear(tokens, self.fc1.weight[ids], bias))
        return nn.functional.linear(hidden, self.fc2.weight.index_select(1, ids))


def moe_layers(model: nn.Module) -> dict[int, MoeMlp]:
    """Return the routed layers of ``model`` by layer index, as counted in the dense model."""
    return {i: m for i, m in enumerate(all_mlps(model).values()) if isinstance(m, MoeMlp)}


def moe_names(model: nn.Module) -> dict[int, str]:
    """Module names of the routed layers of ``model`` by layer index."""
    return {i: name for i, (name, m) in enumerate(all_mlps(model).items()) if isinstance(m, MoeMlp)}


def all_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return every MLP by module name, routed or dense, in order."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoeMlp) or is_plain_mlp(module)
    }


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put ``new`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, new)


def _rows_of(linear: nn.Linear, rows: torch.Tensor) -> nn.Linear:
    part = nn.Linear(linear.in_features, len(rows), bias=linear.bias is not None)
    part = part.to(linear.weight.device, linear.weight.dtype)
    with torch.no_grad():
        part.weight.copy_(linear.weight[rows])
        if linear.bias is not None:
            part.bias.copy_(linear.bias[rows])
    return part.requires_grad_(linear.weight.requires_grad)


def _columns_of(linear: nn.Linear, columns: torch.Tensor) -> nn.Linear:
    part = nn.Linear(len(columns), linear.out_features)
    part = part.to(linear.weight.device, linear.weight.dtype)
    with torch.no_grad():
        part.weight.copy_(linear.weight[:, columns])
        part.bias.zero_() if linear.bias is None else part.bias.copy_(linear.bias)
    return part.requires_grad_(linear.weight.requires_grad)
