"""The MoE layer: an MLP whose tokens each use the hidden neurons of their own expert."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from moee_analysis.counting import tokens_of
from moee_analysis.errors import MoeeError
from moee_analysis.models import is_plain_mlp

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from timm.layers import Mlp


@dataclass(frozen=True)
class Readout:
    """What stands in for W2, and what joins b2, once neurons are gone.

    Attributes
    ----------
    weight
        In the numbering of the dense neurons: (dim, hidden), one W2 for all experts;
        (experts, dim, hidden), one for each; None: the dense W2.
    shift
        (experts, dim), added to the output of every token that uses the expert, such as the
        mean of what its dropped neurons contributed; None: nothing.
    """

    weight: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class MoeMlp(nn.Module):
    """Experts cut out of one dense MLP, and the router that chooses among them.

    Experts may share hidden neurons. The rows of W1 and columns of W2 that any expert uses are
    stored once, in ``fc1`` and ``fc2``; each expert is a list of indices into them. Only where
    every expert has a W2 of its own does ``fc2`` hold the columns of one expert after the other.
    Neurons that no expert uses are gone. The output is b2 plus the sum over the token's experts,
    so a layer whose every expert keeps all neurons is the dense MLP when each token has one
    expert. An expert without neurons is a constant.

    Parameters
    ----------
    mlp
        The dense ``timm.layers.Mlp`` to cut from.
    router
        The whole input (..., dim) -> expert ids of its tokens in row-major order, int64 (n, k).
    experts
        Sorted ids of the dense hidden neurons that each expert keeps.
    shares
        Share of the calibration tokens that use each expert, (experts,); sums to k.
    readout
        Refitted output weights and shifts; None: those of ``mlp``, and no shifts.

    Raises
    ------
    MoeeError
        A readout of another shape.
    """

    def __init__(
        self,
        mlp: Mlp,
        router: nn.Module,
        experts: Sequence[np.ndarray],
        shares: np.ndarray,
        readout: Readout | None = None,
    ) -> None:
        super().__init__()
        readout = readout or Readout()
        _check(readout, mlp, experts=len(experts))
        ids = [torch.as_tensor(ids, dtype=torch.int64) for ids in experts]
        union = torch.unique(torch.cat(ids))
        neurons = torch.cat([torch.searchsorted(union, i) for i in ids])
        weight = mlp.fc2.weight if readout.weight is None else readout.weight
        columns = neurons if weight.ndim == 2 else torch.arange(len(neurons))
        self.hidden_dense = mlp.fc1.out_features
        self.fc1 = _rows_of(mlp.fc1, union)
        self.act = mlp.act
        self.fc2 = _with_columns(mlp.fc2, _used(weight, union, ids))
        self.register_parameter("shift", _shift(mlp.fc2, readout))
        self.router = router
        self.register_buffer("kept", union)
        self.register_buffer("neurons", neurons)
        self.register_buffer("columns", None if torch.equal(columns, neurons) else columns)
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
        return self.neurons[self._place(expert)]

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
        tokens, chosen = tokens_of(x), self.router(x)
        flat = chosen.flatten()
        rows = flat.argsort(stable=True) // chosen.shape[1]
        met = rows.split(flat.bincount(minlength=self.n_experts).tolist())
        parts = [self._expert(tokens[part], expert) for expert, part in enumerate(met)]
        out = self._constant(chosen)
        # under autocast the products are of a lower precision than the bias
        out.index_add_(0, rows, torch.cat(parts).to(out.dtype))
        return out.reshape(*x.shape[:-1], out.shape[-1])

    def _constant(self, chosen: torch.Tensor) -> torch.Tensor:
        """What each token gets whatever it is, (n, dim): b2 and the shifts of its experts."""
        if self.shift is None:
            return self.fc2.bias.expand(len(chosen), -1).clone()
        return self.fc2.bias + self.shift[chosen].sum(dim=1)

    def _place(self, expert: int) -> slice:
        """Where the lists of all experts hold this one's."""
        start = int(self.sizes[:expert].sum())
        return slice(start, start + int(self.sizes[expert]))

    def _expert(self, tokens: torch.Tensor, expert: int) -> torch.Tensor:
        """Output of one expert without what is constant."""
        place = self._place(expert)
        ids = self.neurons[place]
        columns = ids if self.columns is None else self.columns[place]
        bias = None if self.fc1.bias is None else self.fc1.bias[ids]
        hidden = self.act(nn.functional.linear(tokens, self.fc1.weight[ids], bias))
        return nn.functional.linear(hidden, self.fc2.weight.index_select(1, columns))


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


def _check(readout: Readout, mlp: Mlp, *, experts: int) -> None:
    one = tuple(mlp.fc2.weight.shape)
    shapes = {"weight": (one, (experts, *one)), "shift": ((experts, one[0]),)}
    for name, fitting in shapes.items():
        given = getattr(readout, name)
        if given is not None and tuple(given.shape) not in fitting:
            raise MoeeError(
                f"the readout's {name} of shape {' or '.join(map(str, fitting))}",
                str(tuple(given.shape)),
                "number experts, outputs and hidden neurons as in the dense MLP",
            )


def _used(weight: torch.Tensor, union: torch.Tensor, experts: list[torch.Tensor]) -> torch.Tensor:
    """Columns of W2 that are stored: those of the union, or every expert's own."""
    if weight.ndim == 2:
        return weight[:, union]
    return torch.cat([own[:, ids] for own, ids in zip(weight, experts, strict=True)], dim=1)


def _shift(linear: nn.Linear, readout: Readout) -> nn.Parameter | None:
    if readout.shift is None:
        return None
    values = readout.shift.detach().to(linear.weight, copy=True)
    return nn.Parameter(values, requires_grad=linear.weight.requires_grad)


def _rows_of(linear: nn.Linear, rows: torch.Tensor) -> nn.Linear:
    bias = None if linear.bias is None else linear.bias[rows]
    return _filled(linear, linear.weight[rows], bias)


def _with_columns(linear: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    bias = linear.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias
    return _filled(linear, weight, bias)


def _filled(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Linear layer of these values; device, precision and trainability are those of ``linear``."""
    with warnings.catch_warnings():
        # torch warns that a layer of no neurons has no initial values to draw
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        part = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    part = part.to(linear.weight.device, linear.weight.dtype)
    with torch.no_grad():
        part.weight.copy_(weight)
        if bias is not None:
            part.bias.copy_(bias)
    return part.requires_grad_(linear.weight.requires_grad)
