"""Checkpoint recycling: which units of a dense model a narrower one, and its experts, take over.

Activations of channels, heads and hidden neurons, summed over the tokens of images, decide. Heads
are kept whole; the released code mixes their dimensions. Source: MoE Jetpack, section 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.equal_parts import divide_graph
from moee_analysis.baselines.common.exchange import Store
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.narrow_model import heads_of, stage_of, unit_counts
from moee_analysis.data.images import ImageSet
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite, find_mlps, fingerprint
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key, get_or_build

BATCH = 32  # images
PARTS = 32  # of a graph, as in the released code
SMALLEST = 8  # units of a part, where there are few


Profile = Mapping[str, torch.Tensor]
"""Sums over the tokens of all images, float64, called ``<place>.<kind>``.

Places are ``<mlp>`` (hidden neurons, after the activation), ``<mlp>.fc1`` (channels, as the MLP
sees them) and ``<attention>`` (what its projection sees). Kinds are ``squares``, ``tokens``,
and for MLPs ``together``, if asked for: how often two are positive at once, units x units.
"""


def profile(
    model: nn.Module, images: ImageSet, *, together: bool = False, store: Store = None
) -> Profile:
    """Run ``model`` over the images once and add up its activations, also of pairs ``together``."""
    if store is None:
        return _add_up(model, images, together=together)

    def fill(folder: Path) -> None:
        save_file(_add_up(model, images, together=together), folder / "sums.safetensors")

    key = content_key(
        profile=2, model=fingerprint(model), images=images.fingerprint, together=together
    )
    folder = get_or_build(Path(store), f"profile-{key}", fill)
    return load_file(folder / "sums.safetensors")


def worth_of(found: Profile, place: str) -> np.ndarray:
    """Root mean square activation of every unit at a place."""
    return (found[f"{place}.squares"] / found[f"{place}.tokens"]).sqrt().numpy()


def _add_up(model: nn.Module, images: ImageSet, *, together: bool) -> dict[str, torch.Tensor]:
    mlps = [site.name for site in find_mlps(model)]
    places = {name: f"{name}.proj" for name in heads_of(model)}
    places |= {f"{name}.fc1": f"{name}.fc1" for name in mlps} | {n: f"{n}.fc2" for n in mlps}
    modules = {place: model.get_submodule(name) for place, name in places.items()}
    paired = {place for name in mlps for place in (name, f"{name}.fc1") if together}
    sums: dict[str, torch.Tensor] = {}

    def add(place: str, x: torch.Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        part = {"squares": x.square().sum(0), "tokens": torch.tensor(len(x))}
        if place in paired:
            active = (x > 0).float()
            part["together"] = active.T @ active
        for kind, values in part.items():
            name = f"{place}.{kind}"
            sums[name] = values.double() + sums.get(name, 0)  # counts of many images stay exact

    batches = images.batches(model, batch_size=BATCH)
    with watch(modules, add), evaluating(model):
        total = -(-len(images) // BATCH)
        for batch in progress(batches, label="profiling activations", total=total):
            model(like(batch, model))
    return {name: tensor.cpu() for name, tensor in sums.items()}


@dataclass(frozen=True)
class Units:
    """Units of one kind at one place, of which some are chosen.

    ``worth`` (total,) and ``together`` (total, total) are those of a :data:`Profile`, None where
    the method needs none; ``seed`` is that of the graph's division.
    """

    total: int
    worth: np.ndarray | None = None
    together: np.ndarray | None = None
    seed: int = 0

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """Parts of the graph whose edges weigh ``together``, as lists of ids.

        The released code leaves out the weights; but almost all edges are there.
        """
        count = min(PARTS, max(1, self.total // SMALLEST))
        weights = np.rint(self.together).astype(np.int64)
        part_of = divide_graph(weights, count, seed=self.seed)
        return [np.flatnonzero(part_of == part) for part in range(count)]


def draw_units(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units of an expert, ascending ids.

    ``importance`` draws units by their worth, ``graph`` whole parts by how often their units are
    active together, but for the last units over.
    """
    if method == "importance":
        return np.sort(draw_order(units.worth, rng)[:size])
    if method == "graph":
        inner = [units.together[np.ix_(part, part)] for part in units.parts]
        weights = np.array([each.sum() - np.trace(each) for each in inner])
        parts = [units.parts[part] for part in draw_order(weights, rng)]
        return np.sort(np.concatenate(parts)[:size])
    return choose_shared(method, units, size, rng)


def choose_shared(method: str, units: Units, size: int, rng: np.random.Generator) -> np.ndarray:
    """Choose ``size`` units that all tokens pass through, ascending ids: if it counts, by worth."""
    if method in ("importance", "graph"):
        return np.sort(np.argsort(-units.worth, kind="stable")[:size])
    if method == "uniform":
        return space_evenly(units.total, size)
    return np.sort(rng.permutation(units.total)[:size])


def space_evenly(total: int, size: int) -> np.ndarray:
    """``size`` of ``total`` ids, evenly spaced."""
    return np.linspace(0, total - 1, size).round().astype(np.int64)


def draw_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All ids, drawn one by one by their share of the weights; those without weight come last."""
    noise = rng.gumbel(size=len(weights))  # the largest log-weights plus noise: that very order
    nothing = np.full(len(weights), -np.inf)
    keys = np.log(weights, out=nothing, where=weights > 0) + noise
    return np.argsort(-keys, kind="stable")


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
        """Units that the dense part of the narrow model takes over, ids by their place."""
        rng, sizes = np.random.default_rng([self.config.seed, 0]), unit_counts(self.narrow)
        mlps = [site.name for site in find_mlps(self.dense)]
        chosen, worth = {}, None
        for place, total in unit_counts(self.dense).items():
            if self.found is not None:  # the mean over a stage's layers, or a head's dimensions
                inputs = [f"{name}.fc1" for name in mlps if stage_of(self.dense, name) == place]
                each = [worth_of(self.found, own) for own in inputs or [place]]
                worth = np.mean(each, axis=0).reshape(total, -1).mean(axis=1)
            units = Units(total, worth)
            chosen[place] = choose_shared(self.config.method, units, sizes[place], rng)
        for place, (_, dims) in heads_of(self.dense).items():
            chosen[place] = (chosen[place][:, None] * dims + np.arange(dims)).flatten()
        return chosen

    def cut_experts(self, site: MlpSite, *, core: int, universal: int) -> list[list[Mlp]]:
        """Core and universal experts for the ``site`` of the narrow model; no group is empty."""
        config, mlp = self.config, site.module(self.dense)
        rng = np.random.default_rng([config.seed, 1, site.index])
        shared = self.shared_units[stage_of(self.dense, site.name)]
        neurons = self._find_units(site.name, mlp.fc1.out_features)
        channels = self._find_units(f"{site.name}.fc1", mlp.fc1.in_features)

        def draw(hidden: int) -> Mlp:
            if config.consistent_channels:
                return cut(mlp, shared, draw_units(config.method, neurons, hidden, rng))
            # small experts thin out the neurons of a large one, as in the released code
            full = draw_units(config.method, neurons, site.hidden, rng)
            own = draw_units(config.method, channels, site.dim, rng)
            return cut(mlp, own, full[space_evenly(site.hidden, hidden)])

        small = max(1, round(config.universal_ratio * site.hidden))
        groups = [pair for pair in ((core, site.hidden), (universal, small)) if pair[0]]
        if config.method == "uniform":  # all alike
            return [[draw(hidden)] * count for count, hidden in groups]
        return [[draw(hidden) for _ in range(count)] for count, hidden in groups]

    def _find_units(self, place: str, total: int) -> Units:
        """Units at one place, for experts to draw from."""
        if self.found is None:
            return Units(total)
        pairs = self.found[f"{place}.together"].numpy() if self.config.method == "graph" else None
        return Units(total, worth_of(self.found, place), pairs, self.config.seed)


def cut(mlp: Mlp, channels: np.ndarray, neurons: np.ndarray) -> Mlp:
    """Copy some hidden neurons of an MLP, reading and writing some channels; b2 is kept whole."""
    on = mlp.fc1.weight.device
    rows, columns = (torch.as_tensor(ids).to(on) for ids in (neurons, channels))
    small = Mlp(len(columns), len(rows), device="meta")  # its weights are replaced at once
    for name, outputs, inputs in (("fc1", rows, columns), ("fc2", columns, rows)):
        whole, part = getattr(mlp, name), getattr(small, name)
        weight = whole.weight.detach().index_select(0, outputs).index_select(1, inputs)
        part.weight = nn.Parameter(weight)
        bias = None if whole.bias is None else whole.bias.detach().index_select(0, outputs)
        part.bias = bias if bias is None else nn.Parameter(bias)
    return small
