"""The MoE layer: an MLP whose tokens each use the hidden neurons of their own experts."""

import copy
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import watch
from moee_analysis.models.macs import moe_macs, tokens_of
from moee_analysis.models.survey import survey
from moee_analysis.moe import autotune, kernels
from moee_analysis.moe.autotune import Choice
from moee_analysis.moe.kernels import ExpertGroups, Strategy, group_experts

Usage = dict[str, torch.Tensor]  # how much each expert is used, (experts,), by layer


@dataclass(frozen=True)
class Readout:
    """Refitted output weights, once neurons are gone; None leaves all as it is.

    ``weight`` (dim, hidden) takes the place of W2. ``shift`` (experts, dim), such as the mean of
    what dropped neurons gave, joins the outputs of the expert.
    """

    weight: torch.Tensor | None = None
    shift: torch.Tensor | None = None


class MoeMlp(nn.Module):
    """Experts cut out of one dense MLP, and the router that chooses among them.

    Experts may share hidden neurons. The rows of W1 and columns of W2 that any expert uses are
    stored once, in ``fc1`` and ``fc2``; each expert is a list of indices into them. The output is
    b2 plus the sum over the token's experts; an expert without neurons is a constant.

    ``experts`` are sorted ids of the dense hidden neurons that each keeps, ``shares`` (experts,)
    those of the calibration tokens that use each: they sum to k, the experts of a token.
    ``router`` is like ``routers.Router``. A ``readout`` of another shape is refused.
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
        _check_shapes(readout, mlp, experts=len(experts))
        ids = [torch.as_tensor(ids, dtype=torch.int64) for ids in experts]
        union = torch.unique(torch.cat(ids))
        w2 = mlp.fc2.weight if readout.weight is None else readout.weight
        b1, b2 = mlp.fc1.bias, mlp.fc2.bias
        self.hidden_dense = mlp.fc1.out_features
        self.fc1 = _linear(mlp.fc1, mlp.fc1.weight[union], None if b1 is None else b1[union])
        self.act = mlp.act
        self.fc2 = _linear(mlp.fc2, w2[:, union], w2.new_zeros(len(w2)) if b2 is None else b2)
        self.register_parameter("shift", _parameter(mlp.fc2, readout.shift))
        self.router = router
        self.register_buffer("kept", union)
        self.register_buffer("neurons", torch.cat([torch.searchsorted(union, i) for i in ids]))
        self.register_buffer("sizes", torch.tensor([len(i) for i in ids]))
        self.register_buffer("shares", torch.as_tensor(shares, dtype=torch.float32))
        self.register_buffer("mask", None, persistent=False)
        self.strategy: Strategy | None = None
        self._prepare()
        self.register_load_state_dict_post_hook(MoeMlp._prepare)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (..., dim) to (..., dim): route them, then compute the experts they go to."""
        tokens, chosen = tokens_of(x), self.router(x)
        strategy = self.choose_strategy(tokens, chosen).strategy
        outputs = self.compute(tokens, chosen, strategy)
        return outputs.reshape(*x.shape[:-1], self.fc2.out_features)

    def compute(
        self, tokens: torch.Tensor, chosen: torch.Tensor, strategy: Strategy
    ) -> torch.Tensor:
        """Outputs (n, dim) of ``tokens`` (n, dim) from the experts ``chosen`` for each, (n, k)."""
        if strategy.name == "masked" or not len(tokens) or not len(self.kept):
            return kernels.masked(self, tokens, chosen)
        count = strategy.groups
        if count not in self._groups:
            self._groups[count] = group_experts(self.mask, self.shares, count)
        return kernels.IN_GROUPS[strategy.name](self, self._groups[count], tokens, chosen)

    def choose_strategy(self, tokens: torch.Tensor, chosen: torch.Tensor) -> Choice:
        """The strategy that is set, or the fastest, measured once for about as many tokens."""
        if self.strategy is not None:
            return Choice(self.strategy, "set")
        reason = autotune.reason_for_masked(tokens, self, macs=2 * self.fc1.weight.numel())
        if reason:
            return Choice(autotune.MASKED, reason)
        key = autotune.situation(tokens)
        self._batches[key] = self._batches.get(key, 0) + 1
        if key not in self.choices:
            if autotune.is_early(self._batches[key]):
                return Choice(autotune.MASKED, f"measured from batch {autotune.FEW + 1} on")
            compute = partial(self.compute, tokens, chosen)
            self.choices[key] = autotune.choose_fastest(compute, tokens, experts=self.n_experts)
        return self.choices[key]

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
        return self.neurons.split(self.expert_sizes)[expert]

    def macs_per_token(self, shares: torch.Tensor | None = None) -> float:
        """Expected MACs of one token: the router, and 2 d |S_e| by its own or these ``shares``."""
        shares = self.shares if shares is None else shares.to(self.sizes.device)
        neurons = torch.dot(shares.double(), self.sizes.double()).item()
        dim = self.fc1.in_features + self.fc2.out_features
        return self.router.macs + dim * neurons

    def usage(self, routed: torch.Tensor) -> torch.Tensor:
        """How many tokens use each expert, float64 (experts,), by what the router returned."""
        return torch.bincount(routed.flatten(), minlength=self.n_experts).double()

    def _prepare(self, _keys: object = None) -> None:
        """Make the experts' masks anew; forget strategies and groups that were chosen before."""
        self.mask = self.fc1.weight.new_zeros(len(self.sizes), len(self.kept))
        self.mask[torch.repeat_interleave(self.sizes), self.neurons] = 1
        self.uniform = len(self.neurons) == self.mask.numel()  # all experts keep all neurons
        self.choices: dict[Hashable, Choice] = {}
        self._batches: dict[Hashable, int] = {}
        self._groups: dict[int | None, ExpertGroups] = {}

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        self._groups.clear()  # of another device
        shares = self.shares  # MACs are counted with them: model.half() must not round them
        moved = super()._apply(*args, **kwargs)
        self.shares = shares.to(self.shares.device)
        return moved


def set_dispatch(model: nn.Module, strategy: str, *, groups: int | None = None) -> None:
    """Choose how the routed layers of ``model`` are computed: see ``kernels.py``.

    ``strategy`` is ``masked``, ``sorted`` or ``grouped_mm``, the latter two in so many ``groups``
    of experts (None: each by itself), or ``auto``: the fastest, measured once for about as many
    tokens. Another strategy, or groups where there are none, are refused.
    """
    known = ", ".join(kernels.STRATEGIES)
    if strategy not in ("auto", *kernels.STRATEGIES):
        raise MoeeError(f"a strategy among auto, {known}", f"'{strategy}'", "name one of them")
    if groups is not None and (groups < 1 or strategy not in kernels.IN_GROUPS):
        raise MoeeError("one group or more, of a strategy with groups", f"{groups}", "leave it out")
    for layer in moe_layers(model).values():
        layer.strategy = None if strategy == "auto" else Strategy(strategy, groups)


def moe_layers(model: nn.Module) -> dict[int, MoeMlp]:
    """Return the routed layers of ``model`` by layer index, as counted in the dense model."""
    return {i: m for i, m in enumerate(all_mlps(model).values()) if isinstance(m, MoeMlp)}


def moe_names(model: nn.Module) -> dict[int, str]:
    """Module names of the routed layers of ``model`` by layer index."""
    return {i: name for i, (name, m) in enumerate(all_mlps(model).items()) if isinstance(m, MoeMlp)}


def all_mlps(model: nn.Module) -> dict[str, nn.Module]:
    """Return every MLP by module name, in order: routed, or dense and convertible by `survey`."""
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


def without_routing(model: nn.Module) -> nn.Module:
    """Return a copy of a statically pruned model whose layers of one expert are plain MLPs."""
    model = copy.deepcopy(model)
    for name, layer in all_mlps(model).items():
        if isinstance(layer, MoeMlp) and layer.n_experts == 1:
            mlp = Mlp(1)
            mlp.fc1, mlp.act, mlp.fc2 = layer.fc1, layer.act, layer.fc2
            if layer.shift is not None:
                mlp.fc2.bias.data += layer.shift.data[0]
            replace_module(model, name, mlp.train(layer.training))
    return model


@runtime_checkable
class ExpertLayer(Protocol):
    """A layer whose ``router`` decides what its ``n_experts`` experts compute."""

    router: nn.Module

    @property
    def n_experts(self) -> int:
        """Number of experts."""

    def usage(self, routed: Any) -> torch.Tensor:
        """Tokens, or shares of their outputs, of each expert, float64 (experts,)."""


def expert_layers(model: nn.Module) -> dict[str, ExpertLayer]:
    """Return the layers of ``model`` that have experts, in order, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, ExpertLayer)}


@contextmanager
def counting_usage(models: Mapping[Hashable, nn.Module]) -> Iterator[dict[Hashable, Usage]]:
    """While open, add up how much each expert is used, float64 (experts,), by model and layer."""
    layers = {(n, place): e for n in models for place, e in expert_layers(models[n]).items()}
    sums: dict[Hashable, Usage] = {name: {} for name in models}
    for (name, place), layer in layers.items():
        sums[name][place] = torch.zeros(layer.n_experts, dtype=torch.float64)

    def add(key: tuple[Hashable, str], routed: Any) -> None:
        sums[key[0]][key[1]] += layers[key].usage(routed).cpu()

    with watch({key: layer.router for key, layer in layers.items()}, add, "outputs"):
        yield sums


def macs_as_used(model: nn.Module, usage: Usage | None = None) -> float:
    """MACs of one image, with experts used as :func:`counting_usage` counted, or in calibration.

    Layers that hold parts of a dense MLP cost what their tokens use; all else costs what it runs.
    """
    per_token = {}
    for name, layer in expert_layers(model).items():
        if isinstance(layer, MoeMlp):
            shares = layer.shares
            if usage is not None:
                shares = shares.double().sum().item() * usage[name] / usage[name].sum()
            per_token[name] = layer.macs_per_token(shares)
    return moe_macs(model, per_token)


def _check_shapes(readout: Readout, mlp: Mlp, *, experts: int) -> None:
    dim, hidden = mlp.fc2.weight.shape
    for name, shape in {"weight": (dim, hidden), "shift": (experts, dim)}.items():
        given = getattr(readout, name)
        if given is not None and tuple(given.shape) != shape:
            raise MoeeError(
                f"the readout's {name} of shape {shape}", str(tuple(given.shape)),
                "number experts, outputs and hidden neurons as in the dense MLP",
            )  # fmt: skip


def _parameter(like: nn.Linear, values: torch.Tensor | None) -> nn.Parameter | None:
    if values is None:
        return None
    values = values.detach().to(like.weight).clone(memory_format=torch.contiguous_format)
    return nn.Parameter(values, requires_grad=like.weight.requires_grad)


def _linear(like: nn.Linear, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """Linear layer of these values; device, precision and trainability are those of ``like``."""
    part = nn.Linear(1, 1, device="meta")  # torch draws values for others, and warns of no neurons
    part.out_features, part.in_features = weight.shape
    part.weight, part.bias = _parameter(like, weight), _parameter(like, bias)
    return part
