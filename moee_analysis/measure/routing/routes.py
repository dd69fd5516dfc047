"""Which expert every token of a set of images goes to: the one record all routing measures read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.extraction.record.token_kinds import kinds_seen
from moee_analysis.models.class_names import class_labels, knows_classes
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import moe_layers, moe_names
from moee_analysis.utils.progress import progress


@dataclass(frozen=True)
class Routes:
    """The routing of every token of some images, by layer index counted from 0.

    Attributes
    ----------
    counts
        int32 (images, experts): how many tokens of an image use an expert.
    experts
        int16 (images, tokens): the expert of each token, leading ones and then patches row by row;
        only layers with one expert per token.
    labels
        int64 (images,): class index of each image.
    class_names
        Readable name of every class index in ``labels``.
    k
        Experts per token.
    prefix_tokens, grid
        Tokens before the patches (CLS), and rows and columns of the patches after them: (1, n)
        where the places of patches are not known, (0, 0) where there are none.
    tokens_per_image
        Tokens of one image.
    system
        Name of the routed system, for tables and captions.
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

    def patch_experts(self, layer: int) -> np.ndarray:
        """Expert of every patch of a layer, int16 (images, rows, columns)."""
        patches = self.experts[layer][:, self.prefix_tokens[layer] :]
        return patches.reshape(len(patches), *self.grid[layer])


def routes(
    model: Extraction | nn.Module,
    images: ImageSet,
    *,
    routers: Mapping[int, nn.Module] | None = None,
    system: str = "MoEE",
    batch_size: int | None = None,
    by_folder: bool = False,
) -> Routes:
    """Route all tokens of ``images`` in one forward pass.

    Parameters
    ----------
    model
        A model with routed layers, whose own routers are watched; or any model, with
        ``routers``.
    routers
        Routers (input of an MLP [..., d] -> experts [n, k]) by layer index: each is applied to
        the input of that MLP of ``model`` and changes nothing in the pass.
    system
        Name of the routed system, for tables and captions.
    by_folder
        The classes are the folders of the images, numbered in the order of their names; those that
        are classes of the model have its readable names. So they are, too, where a folder is none
        of the model's classes: routing needs no labels.

    Raises
    ------
    MoeeError
        No routed layer in the model, or a router for a layer that the model does not have.
    """
    model = model_of(model)
    size = fitting_batch(model, batch_size)
    taps = _own_taps(model) if routers is None else _outside_taps(model, routers)
    labels, names = _classes(model, images, by_folder=by_folder)
    _run(model, images, taps, size)
    leading = {tap.index: _leading(model, tap.shape) for tap in taps}
    places = {
        tap.index: patch_places(model, tap.name, tap.shape, leading=leading[tap.index])
        for tap in taps
    }
    return Routes(
        counts={tap.index: tap.all_counts() for tap in taps},
        experts={
            tap.index: _row_by_row(np.concatenate(tap.experts), places[tap.index])
            for tap in taps
            if tap.experts
        },
        labels=labels,
        class_names=names,
        k={tap.index: tap.k for tap in taps},
        prefix_tokens=leading,
        grid={index: of_layer.shape for index, of_layer in places.items()},
        tokens_per_image={tap.index: math.prod(tap.shape) for tap in taps},
        system=system,
    )


def _classes(
    model: nn.Module, images: ImageSet, *, by_folder: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Label of every image, and the readable names of all: the model's classes, or the folders."""
    if not by_folder:
        with suppress(MoeeError):  # a model or folders without such classes: routing needs none
            labels = images.labels(model)
            names = class_labels(model) if knows_classes(model) else sorted(images.classes)
            return labels, {int(label): names[label] for label in np.unique(labels)}
    return _folder_classes(model, images)


def _folder_classes(model: nn.Module, images: ImageSet) -> tuple[np.ndarray, dict[int, str]]:
    folders = sorted(set(images.folders))
    names = {number: _readable(model, images, folder) for number, folder in enumerate(folders)}
    return np.array([folders.index(folder) for folder in images.folders]), names


def _readable(model: nn.Module, images: ImageSet, folder: str) -> str:
    try:
        (label,) = images.take([images.folders.index(folder)]).labels(model)
    except MoeeError:
        return folder
    return class_labels(model)[label]


def model_of(run: Extraction | nn.Module) -> nn.Module:
    """The routed model of an extraction; a model stands for itself."""
    return run if isinstance(run, nn.Module) else run.model


@dataclass
class _Tap:
    """Where one layer's routing is read, and what has been read so far."""

    index: int
    name: str
    site: nn.Module
    router: nn.Module
    n_experts: int  # a router that does not say is known by the experts it has chosen
    inside: bool  # the site runs the router itself
    shape: tuple[int, ...] = ()  # of an image's tokens: (windows, tokens) or (1, rows, columns)
    k: int = 1
    images: int = 0  # in the present batch
    counts: list[np.ndarray] = field(default_factory=list)
    experts: list[np.ndarray] = field(default_factory=list)

    def see_input(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        (x,) = args
        self.shape = (x.shape[0] // self.images, *x.shape[1:-1])
        if not self.inside:
            self.router(x)

    def see_choice(self, _: nn.Module, __: tuple[torch.Tensor, ...], chosen: torch.Tensor) -> None:
        self.k = chosen.shape[1]
        per_image = chosen.reshape(self.images, -1).cpu()
        self.n_experts = max(self.n_experts, int(per_image.max()) + 1)
        self.counts.append(_count(per_image, self.n_experts))
        if self.k == 1:
            self.experts.append(per_image.numpy().astype(np.int16))

    def all_counts(self) -> np.ndarray:
        """The counts of all batches: int32 (images, experts)."""
        rows = [np.pad(c, ((0, 0), (0, self.n_experts - c.shape[1]))) for c in self.counts]
        return np.concatenate(rows)


def _count(chosen: torch.Tensor, n_experts: int) -> np.ndarray:
    """How often each expert occurs in each row of ``chosen``: int32 (rows, experts)."""
    rows = chosen.shape[0]
    cells = chosen + n_experts * torch.arange(rows).unsqueeze(1)
    counts = torch.bincount(cells.flatten(), minlength=rows * n_experts)
    return counts.reshape(rows, n_experts).numpy().astype(np.int32)


def _own_taps(model: nn.Module) -> list[_Tap]:
    layers = moe_layers(model)
    if not layers:
        raise MoeeError(
            "a model with routed layers",
            f"a dense {type(model).__name__}",
            "extract its experts first, or pass routers={layer: router}",
        )
    names = moe_names(model)
    return [
        _Tap(index, names[index], layer, layer.router, layer.n_experts, inside=True)
        for index, layer in layers.items()
    ]


def _outside_taps(model: nn.Module, routers: Mapping[int, nn.Module]) -> list[_Tap]:
    sites = {site.index: site for site in find_mlps(model)}
    unknown = sorted(set(routers) - set(sites))
    if unknown:
        raise MoeeError(
            f"routers for layers 0 to {max(sites)}", f"one for layer {unknown[0]}",
            "count layers from 0",
        )  # fmt: skip
    return [
        _Tap(
            index, sites[index].name, sites[index].module(model), router,
            getattr(router, "n_experts", 1), inside=False,
        )
        for index, router in sorted(routers.items())
    ]  # fmt: skip


def _run(model: nn.Module, images: ImageSet, taps: list[_Tap], batch_size: int) -> None:
    batches = images.batches(model, batch_size=batch_size)
    like = next(model.parameters())
    with evaluating(model), _tapping(taps):
        for x in progress(batches, label="routing", total=math.ceil(len(images) / batch_size)):
            for tap in taps:
                tap.images = len(x)
            model(x.to(like))


@contextmanager
def _tapping(taps: list[_Tap]) -> Iterator[None]:
    with ExitStack() as hooks:
        for tap in taps:
            hooks.callback(tap.site.register_forward_pre_hook(tap.see_input).remove)
            hooks.callback(tap.router.register_forward_hook(tap.see_choice).remove)
        yield


def _leading(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Tokens before the patches, of tokens (windows, ...) of an image; windows have none."""
    return len(kinds_seen(model, shape[1:])) if shape[0] == 1 else 0


def _row_by_row(experts: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Experts of leading tokens, as they stand, and of patches in the order of their places."""
    leading = experts.shape[1] - places.size
    return np.hstack([experts[:, :leading], experts[:, leading:][:, places.ravel()]])
