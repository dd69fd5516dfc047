"""Whether experts stand for parts of the scene: expert of a patch against the part it shows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.special import entr, xlogy
from scipy.stats import random_table

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import Groups, against_chance, basic_interval, repeat
from moee_analysis.measure.routing.resolve import Source, all_routes, chosen_layers
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.utils.checks import draw_numbers


def modularity(
    source: Source,
    images: ImageSet,
    *,
    layers: Sequence[int] = (),
    permutations: int = 100,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Adjusted mutual information between the expert of a patch token and the part it shows.

    A patch shows the part that covers most of it; the mask is laid over the patches as a whole,
    so the model's transform must not crop. Three null hypotheses, from strong to weak:
    the masks exchanged between images of the same class (the expert knows the class and the
    place, no more), between any images (it knows the place), tokens shuffled (it knows nothing).

    Parameters
    ----------
    source
        A run, its routes on ``images``, or the routes of several systems on them.
    images
        Images with part masks: the bundled scenes.
    layers
        Layers to show, counted from 0; empty: all with one expert per token.
    permutations, resamples, seed
        Of the three nulls, and of the image bootstrap.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``experts``, ``parts``, ``images``, ``tokens`` (patches),
        ``ami`` (adjusted mutual information, 0 chance, 1 the same partition), ``low``, ``high``
        (95 % basic bootstrap interval over images), ``null_mean``, ``null_high`` (95 %), ``p``,
        ``excess`` (masks exchanged between any images), ``class_null_mean``,
        ``class_null_high``, ``class_p`` (between images of one class), ``token_null_mean``,
        ``token_null_high`` (tokens shuffled), ``seed``.

    Raises
    ------
    MoeeError
        Images without part masks, routes of other images, no layer with one expert per token and
        a grid of patches, no permutations or resamples.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    several = all_routes(source, images)
    masks = _masks(images)
    plan = _Plan(permutations, resamples, seed)
    rows = [
        _row(routes, layer, masks(routes.grid[layer]), plan)
        for routes in several
        for layer in _patch_layers(routes, layers, images)
    ]
    table = pd.DataFrame(rows)
    table.attrs["caption"] = (
        f"Patch tokens of {len(images)} images; a patch shows the part that covers most of it. "
        f"{permutations} permutations, {resamples} bootstrap resamples of images, seed {seed}."
    )
    return table


def part_profile(source: Source, images: ImageSet, *, layers: Sequence[int] = ()) -> pd.DataFrame:
    """What each expert responds to: the parts that its patches show.

    Parameters and errors as in :func:`modularity`.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``expert``, ``part``, ``tokens`` (patches of this expert with this
        part), ``share`` (of the expert's patches), ``share_all`` (of all patches), ``size``
        (the expert's share of all patches), ``order`` (position of the expert in a heat map:
        linkage of the profiles). Parts that no patch shows are left out.
    """
    several = all_routes(source, images)
    masks = _masks(images)
    tables = [
        _profile(_counted(routes, layer, masks(routes.grid[layer])), images.parts).assign(
            system=routes.system, layer=layer
        )
        for routes in several
        for layer in _patch_layers(routes, layers, images)
    ]
    table = pd.concat(tables, ignore_index=True)
    table.attrs["caption"] = (
        f"Patch tokens of {len(images)} images; a patch shows the part that covers most of it."
    )
    return table[["system", "layer", *(c for c in table if c not in {"system", "layer"})]]


def check_masks(images: ImageSet) -> None:
    """Raise a MoeeError if the images have no part masks."""
    if not images.parts:
        raise MoeeError(
            "images with part masks", f"'{images.name}', which has none",
            "only the bundled scenes know their parts: use load_images('bundled')",
        )  # fmt: skip


def patch_parts(mask: np.ndarray, grid: tuple[int, int], n_parts: int) -> np.ndarray:
    """Part that covers most of each patch: int64 (rows * columns,).

    ``mask`` is (height, width) with part values below ``n_parts``; a tie goes to the lower value.
    """
    rows, columns = grid
    height, width = mask.shape
    row, column = np.arange(height) * rows // height, np.arange(width) * columns // width
    patch = row[:, None] * columns + column
    cells = patch * n_parts + mask
    area = np.bincount(cells.ravel(), minlength=rows * columns * n_parts)
    return area.reshape(rows * columns, n_parts).argmax(axis=1)


def adjusted_mutual_information(tables: np.ndarray, chance: float) -> np.ndarray:
    """AMI of contingency tables (..., experts, parts), as scikit-learn defines it.

    ``chance`` is the expected mutual information in nats (:func:`expected_information`); it
    depends on the margins only, so tables of shuffled labels share it.
    """
    p = tables / tables.sum(axis=(-2, -1), keepdims=True)
    experts, parts = p.sum(axis=-1), p.sum(axis=-2)
    h_experts, h_parts = entr(experts).sum(axis=-1), entr(parts).sum(axis=-1)
    information = h_experts + h_parts + xlogy(p, p).sum(axis=(-2, -1))
    span = (h_experts + h_parts) / 2 - chance
    return (information - chance) / np.maximum(span, np.finfo(np.float64).eps)


def expected_information(table: np.ndarray) -> float:
    """Expected mutual information, in nats, of tables with the margins of ``table``."""
    from sklearn.metrics.cluster import expected_mutual_information

    full = table[table.any(axis=1)][:, table.any(axis=0)].astype(np.int64)
    if min(full.shape) < 2:
        return 0.0
    return float(expected_mutual_information(full, int(full.sum())))


@dataclass(frozen=True)
class _Plan:
    permutations: int
    resamples: int
    seed: int


@dataclass(frozen=True)
class _Patches:
    """Expert and part of every patch, both int64 (images, patches), and the images' classes."""

    experts: np.ndarray
    parts: np.ndarray
    shape: tuple[int, int]  # number of experts and of parts
    labels: np.ndarray

    def table(self, order: np.ndarray | None = None) -> np.ndarray:
        """Count patches by expert and part; ``order`` gives image i the mask of image order[i]."""
        parts = self.parts if order is None else self.parts[order]
        cells = self.experts * self.shape[1] + parts
        size = self.shape[0] * self.shape[1]
        return np.bincount(cells.ravel(), minlength=size).reshape(self.shape)

    def per_image(self) -> np.ndarray:
        """Return the table of each image, flat: (images, experts * parts)."""
        images, size = len(self.experts), self.shape[0] * self.shape[1]
        cells = self.experts * self.shape[1] + self.parts + size * np.arange(images)[:, None]
        return np.bincount(cells.ravel(), minlength=images * size).reshape(images, size)


def _row(routes: Routes, layer: int, parts: np.ndarray, plan: _Plan) -> dict[str, object]:
    patches = _patches(routes, layer, parts)
    table = patches.table()
    chance = expected_information(table)
    score = partial(adjusted_mutual_information, chance=chance)
    value = score(table)
    low, high = basic_interval(value, score(_resampled(patches, plan)), least=-1.0)
    return {
        "system": routes.system,
        "layer": layer,
        "experts": patches.shape[0],
        "parts": int(table.any(axis=0).sum()),
        "images": routes.n_images,
        "tokens": int(table.sum()),
        "ami": float(value),
        "low": float(low),
        "high": float(high),
        **_nulls(patches, table, score, plan),
        "seed": plan.seed,
    }


def _nulls(
    patches: _Patches, table: np.ndarray, score: Callable[[np.ndarray], np.ndarray], plan: _Plan
) -> dict[str, float]:
    """Compare with masks exchanged between images, within classes, and with tokens shuffled."""
    value = score(table)
    everywhere = Groups.of(np.zeros_like(patches.labels))
    within = Groups.of(patches.labels)
    times = {"times": plan.permutations, "seed": plan.seed}

    def exchanged(groups: Groups) -> dict[str, float]:
        null = repeat(lambda order: score(patches.table(order)), groups.exchanged, **times)
        return against_chance(value, null)

    of_class = {f"class_{name}": number for name, number in exchanged(within).items()}
    shuffled = random_table(table.sum(axis=1), table.sum(axis=0), seed=plan.seed)
    tokens = against_chance(value, score(shuffled.rvs(plan.permutations)))
    found = exchanged(everywhere) | of_class | {f"token_{n}": v for n, v in tokens.items()}
    unwanted = {"class_excess", "token_excess", "token_p"}
    return {name: float(number) for name, number in found.items() if name not in unwanted}


def _resampled(patches: _Patches, plan: _Plan) -> np.ndarray:
    """Tables of redrawn images: (resamples, experts, parts).

    Their margins, and so the information expected by chance, hardly differ from those of all.
    """
    images = len(patches.experts)
    rng = np.random.default_rng(plan.seed + 1)
    weights = rng.multinomial(images, np.full(images, 1 / images), size=plan.resamples)
    counts = weights.astype(np.float32) @ patches.per_image().astype(np.float32)
    return counts.astype(np.float64).reshape(plan.resamples, *patches.shape)


def _patches(routes: Routes, layer: int, parts: np.ndarray) -> _Patches:
    experts = routes.experts[layer][:, routes.prefix_tokens[layer] :].astype(np.int64)
    shape = (routes.counts[layer].shape[1], int(parts.max()) + 1)
    return _Patches(experts, parts, shape, routes.labels)


def _counted(routes: Routes, layer: int, parts: np.ndarray) -> np.ndarray:
    return _patches(routes, layer, parts).table()


def _masks(images: ImageSet) -> Callable[[tuple[int, int]], np.ndarray]:
    """Return a function from a patch grid to the part of each patch, int64 (images, patches)."""
    check_masks(images)
    masks = [images.mask(index) for index in range(len(images))]
    return cache(lambda grid: np.stack([patch_parts(m, grid, len(images.parts)) for m in masks]))


def _patch_layers(routes: Routes, layers: Sequence[int], images: ImageSet) -> list[int]:
    if routes.n_images != len(images):
        raise MoeeError(
            f"routes of the same {len(images)} images", f"routes of {routes.n_images}",
            "route the images that are passed here",
        )  # fmt: skip
    if not routes.experts:
        raise MoeeError(
            "a system with one expert per token", f"several per token in '{routes.system}'",
            "modularity compares partitions: use top-1 routers",
        )  # fmt: skip
    if not routes.placed:
        raise MoeeError(
            "a layer whose patches have known places", f"none in '{routes.system}'",
            "extract experts of layers that see the patches of an image",
        )  # fmt: skip
    return chosen_layers(routes.placed, layers)


def _profile(table: np.ndarray, names: tuple[str, ...]) -> pd.DataFrame:
    shown = np.flatnonzero(table.any(axis=0))
    table = table[:, shown]
    totals = table.sum(axis=1)
    shares = table / np.maximum(totals, 1)[:, None]
    experts, parts = table.shape
    order = np.empty(experts, dtype=np.int64)
    order[_by_profile(shares)] = np.arange(experts)
    return pd.DataFrame(
        {
            "expert": np.repeat(np.arange(experts), parts),
            "part": np.tile([names[part] for part in shown], experts),
            "tokens": table.ravel(),
            "share": shares.ravel(),
            "share_all": np.tile(table.sum(axis=0) / table.sum(), experts),
            "size": np.repeat(totals / totals.sum(), parts),
            "order": np.repeat(order, parts),
        }
    )


def _by_profile(shares: np.ndarray) -> np.ndarray:
    """Order that puts experts with like profiles side by side."""
    if len(shares) < 3:
        return np.arange(len(shares))
    return leaves_list(linkage(np.sqrt(shares), "average", optimal_ordering=True))
