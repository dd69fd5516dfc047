"""Checkpoint recycling: which units of a dense model a narrower one, and its experts, take over.

Source: MoE Jetpack, section 3.2. Heads are kept whole, so that a narrower model has fewer of them;
the released code mixes their dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.equal_parts import divide_graph
from moee_analysis.baselines.jetpack.activation_profile import Profile
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.narrow_model import heads_of, stage_of, unit_counts
from moee_analysis.models.loading import MlpSite, find_mlps

PARTS = 32  # of a graph, as in the released code
SMALLEST = 8  # units of a part, where there are few


@dataclass(frozen=True)
class Units:
    """Units of one kind at one place, of which some are chosen.

    ``worth`` (total,) is their activation, ``together`` (total, total) how often two are active for
    the same token; None where the method needs none. ``seed`` is that of the graph's division.
    """

    total: int
    worth: np.ndarray | None = None
    together: np.ndarray | None = None
    seed: int = 0

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """Parts of the graph whose edges weigh ``together``, as lists of ids.

        The released code takes METIS as well, but leaves out the weights: almost all edges are
        there, and then co-activations decide nothing.
        """
        count = min(PARTS, max(1, self.total // SMALLEST))
        weights = np.rint(self.together).astype(np.int64)
        part_of = divide_graph(weights, count, seed=self.seed)
        return [np.flatnonzero(part_of == part) for part in range(count)]


def draw_units(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units of an expert: ascending ids.

    ``importance`` draws units by their worth, ``graph`` whole parts by how often their units are
    active together, leaving out the last units over.
    """
    if method == "importance":
        return np.sort(draw_order(units.worth, rng)[:size])
    if method == "graph":
        inner = [units.together[np.ix_(part, part)] for part in units.parts]
        weights = np.array([each.sum() - np.trace(each) for each in inner])
        parts = [units.parts[part] for part in draw_order(weights, rng)]
        return np.sort(np.concatenate(parts)[:size])
    return _choose_blindly(method, units.total, size, rng)


def choose_shared(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units that all tokens pass through: ascending ids.

    Where activations decide, those of the highest worth.
    """
    if method in ("importance", "graph"):
        return np.sort(np.argsort(-units.worth, kind="stable")[:size])
    return _choose_blindly(method, units.total, size, rng)


def spaced_evenly(total: int, size: int) -> np.ndarray:
    """``size`` of ``total`` ids, evenly spaced."""
    return np.linspace(0, total - 1, size).round().astype(np.int64)


def draw_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All ids, drawn one by one without replacement, each as likely as its share of the weights.

    Ids without weight come last.
    """
    noise = rng.gumbel(size=len(weights))  # the largest log-weights plus noise: that very order
    nothing = np.full(len(weights), -np.inf)
    keys = np.log(weights, out=nothing, where=weights > 0) + noise
    return np.argsort(-keys, kind="stable")


def _choose_blindly(method: str, total: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if method == "uniform":
        return spaced_evenly(total, size)
    return np.sort(rng.permutation(total)[:size])


Draw = Callable[[int], tuple[np.ndarray, np.ndarray]]
"""Number of hidden neurons -> ids of an expert's channels and neurons."""


class CutLinear(NamedTuple):
    """Some outputs and inputs of a linear map."""

    weight: torch.Tensor
    bias: torch.Tensor


class CutMlp(NamedTuple):
    """Some hidden neurons and channels of an MLP."""

    fc1: CutLinear
    fc2: CutLinear


@dataclass(frozen=True)
class Recycling:
    """A ``dense`` model whose weights go to ``narrow``, a model of the same kind.

    ``found`` is the profile of the dense model, None where the method needs none.
    """

    dense: nn.Module
    narrow: nn.Module
    found: Profile | None
    config: JetpackConfig

    @cached_property
    def shared_units(self) -> dict[str, np.ndarray]:
        """Units that the dense part of the narrow model takes over, ids by their place.

        One set of channels for each stage, by the mean of what they are worth in its layers; heads
        and hidden neurons layer by layer.
        """
        rng, sizes = np.random.default_rng([self.config.seed, 0]), unit_counts(self.narrow)
        chosen = {}
        for place, total in unit_counts(self.dense).items():
            units = Units(total, self._mean_worth(place, total))
            chosen[place] = choose_shared(self.config.method, units, sizes[place], rng)
        for place, (_, dims) in heads_of(self.dense).items():
            chosen[place] = (chosen[place][:, None] * dims + np.arange(dims)).flatten()
        return chosen

    def cut_experts(self, site: MlpSite, *, core: int, universal: int) -> list[list[CutMlp]]:
        """Core and universal experts for the ``site`` of the narrow model; no group is empty."""
        mlp = site.module(self.dense)
        rng = np.random.default_rng([self.config.seed, 1, site.index])
        start = self._draw_neurons if self.config.consistent_channels else self._draw_both
        draw = start(site, rng)
        small = max(1, round(self.config.universal_ratio * site.hidden))
        alike = self.config.method == "uniform"
        groups = [
            [cut(mlp, *draw(hidden))] * count if alike
            else [cut(mlp, *draw(hidden)) for _ in range(count)]
            for count, hidden in ((core, site.hidden), (universal, small))
        ]  # fmt: skip
        return [group for group in groups if group]

    def _draw_neurons(self, site: MlpSite, rng: np.random.Generator) -> Draw:
        """All experts have the channels of the model, and draw neurons."""
        channels = self.shared_units[stage_of(self.dense, site.name)]
        neurons = self._units(site.name, site.module(self.dense).fc1.out_features)
        return lambda size: (channels, draw_units(self.config.method, neurons, size, rng))

    def _draw_both(self, site: MlpSite, rng: np.random.Generator) -> Draw:
        """Every expert draws channels as well; small ones thin out the neurons of a large one."""
        method, fc1 = self.config.method, site.module(self.dense).fc1
        channels = self._units(f"{site.name}.fc1", fc1.in_features)
        neurons = self._units(site.name, fc1.out_features)

        def draw(size: int) -> tuple[np.ndarray, np.ndarray]:
            full = draw_units(method, neurons, site.hidden, rng)
            own = draw_units(method, channels, site.dim, rng)
            return own, full[spaced_evenly(site.hidden, size)]

        return draw

    def _units(self, place: str, total: int) -> Units:
        """Units at one place, for experts to draw from."""
        if self.found is None:
            return Units(total)
        graph = self.config.method == "graph"
        together = self.found.together(place) if graph else None
        worth = self.found.worth(place, self.config.metric)
        return Units(total, worth, together, self.config.seed)

    def _mean_worth(self, place: str, total: int) -> np.ndarray | None:
        """Worth of channels of a stage, heads of an attention, or hidden neurons, (total,)."""
        if self.found is None:
            return None
        mlps = [site.name for site in find_mlps(self.dense)]
        inputs = [f"{name}.fc1" for name in mlps if stage_of(self.dense, name) == place]
        places = inputs or [place]
        worth = np.mean([self.found.worth(each, self.config.metric) for each in places], axis=0)
        return worth.reshape(total, -1).mean(axis=1)  # a head's is the mean of its dimensions


def cut(mlp: Mlp, channels: np.ndarray, neurons: np.ndarray) -> CutMlp:
    """Copy some hidden neurons of an MLP, reading and writing some channels; b2 is kept whole."""
    on = mlp.fc1.weight.device
    rows, columns = (torch.as_tensor(ids).to(on) for ids in (neurons, channels))
    return CutMlp(_cut_linear(mlp.fc1, rows, columns), _cut_linear(mlp.fc2, columns, rows))


def _cut_linear(linear: nn.Linear, outputs: torch.Tensor, inputs: torch.Tensor) -> CutLinear:
    weight = linear.weight.detach().index_select(0, outputs).index_select(1, inputs)
    if linear.bias is None:
        return CutLinear(weight, weight.new_zeros(len(outputs)))
    return CutLinear(weight, linear.bias.detach().index_select(0, outputs))
