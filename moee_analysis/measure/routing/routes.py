"""Which expert every token of a set of images goes to: the one record all routing measures read."""

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.tokens import kinds_seen
from moee_analysis.measure.routing.inputs import Run, batches_of, check_any, choose_layers, model_of
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.class_names import class_labels, knows_classes
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.merging import seeing_tokens
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import moe_layers, moe_names

Routers = Mapping[int, nn.Module]
"""A router for every layer, by index."""


@dataclass(frozen=True)
class Routes:
    """The routing of every token of some images, by layer index counted from 0.

    ``counts``: int32 (images, experts): how many tokens of an image use an expert.
    ``experts``: int16 (images, tokens): the expert of each token, leading ones and then patches row
      by row, where tokens have merged that of the one it went into; only layers with one expert
      per token.
    ``labels``: int64 (images,): class index of each image; ``class_names``: their readable names.
    ``prefix_tokens``, ``grid``: tokens before the patches (CLS), and rows and columns of the
      patches: (1, n) where their places are not known, (0, 0) where there are none.
    ``k``, ``tokens_per_image``: experts of a token, tokens of an image that are left there.
    ``system``: name of the routed system, for tables and captions.
    """

    counts: dict[int, np.ndarray]
    experts: dict[int, np.ndarray]
    labels: np.ndarray
    class_names: dict[int, str]
    k: dict[int, int]
    prefix_tokens: dict[int, int]
    grid: dict[int, tuple[int, int]]
    tokens_per_image: dict[int, int]
    system: str = "MoEE"

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the routed layers, in order."""
        return tuple(sorted(self.counts))

    @property
    def placed(self) -> tuple[int, ...]:
        """Indices of those with one expert per token whose patches have known places, in order."""
        return tuple(layer for layer in sorted(self.experts) if min(self.grid[layer]) > 1)

    @property
    def n_images(self) -> int:
        """Number of images."""
        return len(self.labels)

    def shares(self, layer: int) -> np.ndarray:
        """Share of tokens that use each expert of ``layer``, (experts,); they sum to k."""
        return self.counts[layer].sum(0) / (self.n_images * self.tokens_per_image[layer])

    def image_shares(self, layer: int) -> np.ndarray:
        """Each expert's share of an image's choices, (images, experts); rows sum to 1."""
        counts = self.counts[layer].astype(np.float64)
        return counts / counts.sum(axis=1, keepdims=True)

    def choose_placed(self, wanted: Sequence[int]) -> list[int]:
        """The ``wanted`` layers, or all, whose patches have known places; others are refused."""
        if not self.placed:
            expected, found = "a layer whose patches have known places", f"none in '{self.system}'"
            hint = "extract experts of layers that see the patches of an image"
            raise MoeeError(expected, found, hint)
        return choose_layers(self.placed, wanted)

    def patch_experts(self, layer: int) -> np.ndarray:
        """Expert of every patch of a layer, int16 (images, rows, columns)."""
        patches = self.experts[layer][:, self.prefix_tokens[layer] :]
        return patches.reshape(len(patches), *self.grid[layer])


Source = Run | Routes | Sequence[Routes]
"""A run or a routed model (with images to route), its routes, or the routes of several systems."""


def all_routes(source: Source, images: ImageSet | None = None) -> list[Routes]:
    """Return the routes of ``source``; a run or a routed model is first asked to route ``images``.

    A MoeeError refuses a run without images, and a sequence that is not of routes.
    """
    if isinstance(source, Routes):
        return [source]
    if not isinstance(source, Sequence):
        if images is None:
            hint = "pass images as the second argument"
            raise MoeeError("images to route through the run", "none", hint)
        return [routes(source, images)]
    if not source or not all(isinstance(one, Routes) for one in source):
        found = f"{type(source).__name__} of {len(source)} items that are not all routes"
        hint = "make routes with measure.routes(model, images)"
        raise MoeeError("a run, its routes, or a sequence of routes", found, hint)
    return list(source)


def routes(
    model: Run,
    images: ImageSet,
    *,
    routers: Routers | None = None,
    system: str = "MoEE",
    batch_size: int | None = None,
    by_folder: bool = False,
) -> Routes:
    """Route all tokens of ``images`` in one pass of ``model``, by its own routers or by others.

    ``routers`` (input of an MLP [..., d] -> experts [n, k]) by layer index are applied to the input
    of that MLP and change nothing in the pass. With ``by_folder``, and where a folder is none of
    the model's classes, the classes are the images' folders by name, since routing needs no labels.
    Raises MoeeError: no routed layer, or a router for a layer that the model does not have.
    """
    model = model_of(model)
    size = fitting_batch(model, batch_size)
    sites = _find_sites(model, routers)
    check_any(images)
    labels, names = _name_classes(model, images, by_folder=by_folder)
    chosen, shapes, places = _record_choices(model, images, sites, routers, size)
    owners = moe_layers(model) if routers is None else routers
    routed = Routes({}, {}, labels, names, {}, {}, {}, {}, system)
    for layer, name in sites.items():
        experts, shape = chosen[layer], shapes[layer]
        leading = len(kinds_seen(model, shape[1:])) if shape[0] == 1 else 0  # windows have none
        place = places.get(layer)
        first = shape if place is None else (1, place.shape[1])  # before any tokens merged
        order, grid = order_tokens(model, name, first, leading=leading)
        # a router that does not say how many experts it has is known by those it has chosen
        n_experts = max(getattr(owners[layer], "n_experts", 1), int(experts.max()) + 1)
        cells = experts.reshape(len(images), -1) + n_experts * np.arange(len(images))[:, None]
        counts = np.bincount(cells.ravel(), minlength=len(images) * n_experts)
        routed.counts[layer] = counts.reshape(-1, n_experts).astype(np.int32)
        if experts.shape[2] == 1:
            of_first = experts[..., 0]
            if place is not None:
                of_first = np.take_along_axis(of_first, place, axis=1)
            routed.experts[layer] = of_first[:, order]
        routed.k[layer] = experts.shape[2]
        routed.prefix_tokens[layer], routed.grid[layer] = leading, grid
        routed.tokens_per_image[layer] = math.prod(shape)
    return routed


def order_tokens(
    model: nn.Module, name: str, shape: Sequence[int], *, leading: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Places of an image's tokens, leading ones and then patches row by row, and their grid."""
    places = patch_places(model, name, shape, leading=leading)
    return np.append(np.arange(leading), leading + places), places.shape


def _find_sites(model: nn.Module, routers: Routers | None) -> dict[int, str]:
    if routers is None:
        if not (routed := moe_names(model)):
            hint = "extract its experts first, or pass routers={layer: router}"
            raise MoeeError("a model with routed layers", f"a dense {type(model).__name__}", hint)
        return routed
    sites = {site.index: site.name for site in find_mlps(model)}
    if unknown := sorted(routers.keys() - sites):
        expected, found = f"routers for layers 0 to {max(sites)}", f"one for layer {unknown[0]}"
        raise MoeeError(expected, found, "count layers from 0")
    return {layer: sites[layer] for layer in sorted(routers)}


def _name_classes(
    model: nn.Module, images: ImageSet, *, by_folder: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Label of every image, and the readable names of all: the model's classes, or the folders."""
    if not by_folder:
        with suppress(MoeeError):  # a model or folders without such classes: routing needs none
            labels = images.labels(model)
            names = class_labels(model) if knows_classes(model) else sorted(images.classes)
            return labels, {int(label): names[label] for label in np.unique(labels)}
    folders = sorted(set(images.folders))
    names = dict(enumerate(folders))
    for number, folder in enumerate(folders):
        with suppress(MoeeError):  # a folder that is none of the model's classes keeps its name
            (label,) = images.take([images.folders.index(folder)]).labels(model)
            names[number] = class_labels(model)[label]
    return np.array([folders.index(folder) for folder in images.folders]), names


def _record_choices(
    model: nn.Module, images: ImageSet, sites: dict[int, str], routers: Routers | None, size: int
) -> tuple[dict[int, np.ndarray], dict[int, tuple[int, ...]], dict[int, np.ndarray]]:
    """Experts of all tokens, int16 (images, tokens, k), and the shape of an image's tokens.

    The shape is (windows, tokens) or (1, rows, columns). Where tokens have merged, also the one
    that each went into, int64 (images, first tokens).
    """
    modules, side = {layer: model.get_submodule(name) for layer, name in sites.items()}, "inputs"
    if routers is None:  # what the model's own routers get and give
        modules, side = {layer: module.router for layer, module in modules.items()}, "both"
    latest: dict[int, tuple[torch.Size, torch.Tensor]] = {}

    def see(layer: int, seen: Any) -> None:
        x, chosen = seen if routers is None else (seen, routers[layer](seen))
        latest[layer] = x.shape[:-1], chosen

    parts: dict[int, list[np.ndarray]] = {layer: [] for layer in sites}
    into: dict[int, list[np.ndarray]] = {layer: [] for layer in sites}
    shapes = {}
    layers, seeing = {name: layer for layer, name in sites.items()}, seeing_tokens
    with evaluating(model), watch(modules, see, side), seeing(model, layers) as left:
        for x in batches_of(model, images, size, label="routing"):
            model(x)
            for name, tokens in left.items():
                if tokens.place is not None:
                    into[layers[name]].append(tokens.place.cpu().numpy())
            for layer, (shape, chosen) in latest.items():
                per_image = chosen.reshape(len(x), -1, chosen.shape[1])
                parts[layer].append(per_image.cpu().numpy().astype(np.int16))
                shapes[layer] = (shape[0] // len(x), *shape[1:])
    merged = {layer: np.concatenate(rows) for layer, rows in into.items() if rows}
    return {layer: np.concatenate(rows) for layer, rows in parts.items()}, shapes, merged
