"""The MoE layer: an MLP whose tokens each use the hidden neurons of their own expert."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import tokens_of
from moee_analysis.models.survey import survey
from moee_analysis.moe.kernels.autotune import Choice, measured, situation, unmeasured
from moee_analysis.moe.kernels.dispatch import WAYS, Way
from moee_analysis.moe.kernels.expert_groups import FAR_BELOW, Layout, layout_of
from moee_analysis.moe.kernels.weight_cache import LaidOut
from moee_analysis.utils.matmul import KERNELS


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
        self.register_buffer("lacking", self._lacking(), persistent=False)
        self.silent = _silent(mlp.act, like=mlp.fc1.weight)
        self.way: Way | None = None
        self.choices: dict[Hashable, Choice] = {}
        self.laid_out = LaidOut()
        self._layouts: dict[Hashable, Layout] = {}
        self.register_load_state_dict_post_hook(MoeMlp._renewed)

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

    def expert_output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """What one expert makes of activations of all stored neurons, (n, kept) -> (n, dim)."""
        place = self._place(expert)
        columns = self.neurons if self.columns is None else self.columns
        constant = self.fc2.bias if self.shift is None else self.fc2.bias + self.shift[expert]
        own = hidden.index_select(1, self.neurons[place])
        return torch.addmm(constant, own, self.fc2.weight.index_select(1, columns[place]).T)

    def macs_per_token(self, shares: torch.Tensor | None = None) -> float:
        """Expected MACs of one token: the router, and 2 d |S_e| weighted by how often e is used.

        ``shares`` (experts,) are measured routing shares; None takes the calibration's.
        """
        shares = self.shares if shares is None else shares.to(self.sizes.device)
        neurons = torch.dot(shares.double(), self.sizes.double()).item()
        dim = self.fc1.in_features + self.fc2.out_features
        return self.router.macs + dim * neurons

    def usage(self, routed: torch.Tensor) -> torch.Tensor:
        """How many tokens use each expert, float64 (experts,), by what the router returned."""
        return torch.bincount(routed.flatten(), minlength=self.n_experts).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., dim) to (..., dim)."""
        tokens, chosen = tokens_of(x), self.router(x)
        way = self.way or self._fastest(tokens, chosen).way
        return way(self, tokens, chosen).reshape(*x.shape[:-1], self.fc2.out_features)

    def layout(self, groups: int | None) -> Layout:
        """Return the experts in so many groups at most; None: every expert by itself."""
        key = groups, self.fc1.weight.device, self.fc1.weight.dtype
        if key not in self._layouts:
            with torch.inference_mode(mode=False):  # what is kept can be used in training too
                self._layouts[key] = layout_of(self, groups)
        return self._layouts[key]

    def _fastest(self, tokens: torch.Tensor, chosen: torch.Tensor) -> Choice:
        obvious = unmeasured(self, tokens)
        if obvious is not None:
            return obvious
        key = situation(tokens)
        if key not in self.choices:
            self.choices[key] = measured(self, tokens, chosen)
            self.laid_out.clear()  # for ways that are not the fastest
        return self.choices[key]

    def _lacking(self) -> torch.Tensor:
        """0 where a column of fc2 is for a neuron of the expert, else far below 0.

        (experts, columns).
        """
        shape = len(self.sizes), self.fc2.in_features
        lacking = self.fc2.weight.new_full(shape, FAR_BELOW, requires_grad=False)
        columns = self.neurons if self.columns is None else self.columns
        experts = torch.arange(len(self.sizes), device=columns.device)
        lacking[experts.repeat_interleave(self.sizes), columns] = 0
        return lacking

    def _renewed(self, _keys: object) -> None:
        """Forget what was made of other lists of neurons."""
        self.lacking = self._lacking()
        self.laid_out.clear()
        self._layouts.clear()
        self.choices.clear()

    def _apply(self, *args: Any, **kwargs: Any) -> MoeMlp:
        self.laid_out.clear()  # weights that were moved may stand where others stood before
        shares = self.shares
        moved = super()._apply(*args, **kwargs)
        self.shares = shares.to(self.shares.device)  # a record, exact in half precision too
        return moved

    def _place(self, expert: int) -> slice:
        """Where the lists of all experts hold this one's."""
        start = int(self.sizes[:expert].sum())
        return slice(start, start + int(self.sizes[expert]))


def set_dispatch(
    model: nn.Module, way: str, *, groups: int | None = None, kernel: str = "blas"
) -> None:
    """Choose how the routed layers of ``model`` are computed.

    Parameters
    ----------
    way
        ``masked``, ``sorted`` or ``grouped_mm``, see ``dispatch``; ``auto``: the
        fastest of them for each layer, measured once for about as many tokens.
    groups
        Groups that experts are computed in; None: every expert by itself.
    kernel
        ``blas`` or ``onednn``, what multiplies the matrices (``matmul``);
        ``auto`` chooses this too.

    Raises
    ------
    MoeeError
        Another way or kernel, fewer than one group, or groups where there are none.
    """
    if way not in ("auto", *WAYS):
        raise MoeeError(f"a way among auto, {', '.join(WAYS)}", f"'{way}'", "name one of them")
    if groups is not None and (groups < 1 or way in ("auto", "masked")):
        raise MoeeError("one group or more, of a way with groups", f"{groups}", "leave it out")
    if kernel not in KERNELS:
        raise MoeeError(f"a kernel among {', '.join(KERNELS)}", f"'{kernel}'", "name one of them")
    for layer in moe_layers(model).values():
        layer.way = None if way == "auto" else Way(way, groups, kernel)


def moe_layers(model: nn.Module) -> dict[int, MoeMlp]:
    """Return the routed layers of ``model`` by layer index, as counted in the dense model."""
    return {i: m for i, m in enumerate(all_mlps(model).values()) if isinstance(m, MoeMlp)}


def moe_names(model: nn.Module) -> dict[int, str]:
    """Module names of the routed layers of ``model`` by layer index."""
    return {i: name for i, (name, m) in enumerate(all_mlps(model).items()) if isinstance(m, MoeMlp)}


def all_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return every MLP by module name, routed or dense, in order.

    Dense ones are those that could be routed, as :func:`survey` says.
    """
    dense = {mlp.name for mlp in survey(model) if mlp.convertible}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, MoeMlp) or name in dense
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


@torch.no_grad()
def _silent(act: nn.Module, *, like: torch.Tensor) -> bool:
    """Whether what is far below zero activates nothing at all."""
    return not act(like.new_full((1,), FAR_BELOW)).any()


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
