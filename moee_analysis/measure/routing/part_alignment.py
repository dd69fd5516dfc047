"""Whether experts stand for parts of the scene: expert of a patch against the part it shows."""

from dataclasses import dataclass
from functools import cache, partial

import numpy as np
import pandas as pd
from scipy.special import entr, xlogy

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing import bootstrap
from moee_analysis.measure.routing.inputs import Layers
from moee_analysis.measure.routing.routes import Source, all_routes
from moee_analysis.measure.routing.tables import add_caption, all_rows, order_alike, stack
from moee_analysis.utils.checks import draw_numbers


def modularity(
    source: Source,
    images: ImageSet,
    *,
    layers: Layers = (),
    permutations: int = 100,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Adjusted mutual information between the expert of a patch token and the part it shows.

    A patch shows the part that covers most of it; masks are laid over the patches as a whole, so
    the model's transform must not crop. Two null hypotheses: masks exchanged between images of the
    same class (the expert knows class and place, no more), or between any images (just the place).

    Columns: ``system``, ``layer``, ``experts``, ``parts``, ``images``, ``tokens`` (patches),
    ``ami`` (0 chance, 1 the same partition), ``low``, ``high`` (95 % basic bootstrap interval over
    images), ``null_mean``, ``null_high`` (95 %), ``p``, ``excess`` (masks exchanged between any
    images), ``class_null_mean``, ``class_null_high``, ``class_p`` (between images of one class),
    ``seed``.
    Raises MoeeError: images without part masks, routes of other images, no layer with one expert
    per token and a grid of patches, no permutations or resamples.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    rows = [
        {"system": system, "layer": layer} | _measure(patches, permutations, resamples, seed)
        for system, layer, patches in _patches_of_layers(source, images, layers)
    ]
    return add_caption(
        pd.DataFrame(rows),
        f"{_describe(images)} {permutations} permutations, {resamples} bootstrap resamples of "
        f"images, seed {seed}.",
    )


def part_profile(source: Source, images: ImageSet, *, layers: Layers = ()) -> pd.DataFrame:
    """What each expert responds to: the parts that its patches show.

    Columns: ``system``, ``layer``, ``expert``, ``part`` (that any patch shows), ``tokens`` (patches
    of this expert with this part), ``share`` (of the expert's patches), ``share_all`` (of all),
    ``size`` (the expert's share of all patches), ``order`` (position of the expert in a heat map).
    """
    tables = []
    for system, layer, patches in _patches_of_layers(source, images, layers):
        table = patches.table()
        shown = np.flatnonzero(table.any(axis=0))
        table, total = table[:, shown], table.sum(axis=1)
        shares = table / np.maximum(total, 1)[:, None]
        profile = all_rows(expert=range(len(table)), part=[images.parts[part] for part in shown])
        expert = profile["expert"]
        profile = profile.assign(tokens=table.ravel(), share=shares.ravel())
        profile["share_all"] = np.tile(table.sum(axis=0) / table.sum(), len(table))
        profile["size"] = (total / total.sum())[expert]
        profile["order"] = order_alike(np.sqrt(shares))[expert]
        tables.append((system, layer, profile))
    return add_caption(stack(tables), _describe(images))


def check_masks(images: ImageSet) -> None:
    """Raise a MoeeError if the images have no part masks."""
    if not images.parts:
        hint = "only the bundled scenes know their parts: use load_images('bundled')"
        raise MoeeError("images with part masks", f"'{images.name}', which has none", hint)


def all_patch_parts(images: ImageSet, grid: tuple[int, int]) -> np.ndarray:
    """Part that covers most of each patch of all images, int64 (images, rows * columns)."""
    masks = (images.mask(index) for index in range(len(images)))
    return np.stack([patch_parts(mask, grid, len(images.parts)) for mask in masks])


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

    ``chance`` is the expected mutual information in nats, which tables of the same margins share.
    """
    p = tables / tables.sum(axis=(-2, -1), keepdims=True)
    h_experts, h_parts = (entr(p.sum(axis=axis)).sum(axis=-1) for axis in (-1, -2))
    information = h_experts + h_parts + xlogy(p, p).sum(axis=(-2, -1))
    span = (h_experts + h_parts) / 2 - chance
    return (information - chance) / np.maximum(span, np.finfo(np.float64).eps)


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
        return np.bincount(cells.ravel(), minlength=np.prod(self.shape)).reshape(self.shape)

    def resample(self, times: int, *, seed: int) -> np.ndarray:
        """Tables of redrawn images, whose margins hardly differ: (times, experts, parts)."""
        images, size = len(self.experts), np.prod(self.shape)
        cells = self.experts * self.shape[1] + self.parts + size * np.arange(images)[:, None]
        per_image = np.bincount(cells.ravel(), minlength=images * size).reshape(images, size)
        # float32 is the faster product, and exact: whole numbers that stay below 2**24
        weights = bootstrap.redraw_counts(images, times, seed=seed).astype(np.float32)
        counts = weights @ per_image.astype(np.float32)
        return counts.astype(np.float64).reshape(times, *self.shape)


def _patches_of_layers(
    source: Source, images: ImageSet, layers: Layers
) -> list[tuple[str, int, _Patches]]:
    several = all_routes(source, images)
    check_masks(images)
    found, parts = [], cache(partial(all_patch_parts, images))
    for routes in several:
        if routes.n_images != len(images):
            expected, hint = f"routes of the same {len(images)} images", "route those passed here"
            raise MoeeError(expected, f"routes of {routes.n_images}", hint)
        if not routes.experts:
            found = f"several per token in '{routes.system}'"
            hint = "modularity compares partitions: use top-1 routers"
            raise MoeeError("a system with one expert per token", found, hint)
        for layer in routes.choose_placed(layers):
            experts = routes.experts[layer][:, routes.prefix_tokens[layer] :].astype(np.int64)
            own = parts(routes.grid[layer])
            shape = routes.counts[layer].shape[1], int(own.max()) + 1
            found.append((routes.system, layer, _Patches(experts, own, shape, routes.labels)))
    return found


def _measure(patches: _Patches, permutations: int, resamples: int, seed: int) -> dict[str, object]:
    from sklearn.metrics.cluster import expected_mutual_information

    table = patches.table()
    full = table[table.any(axis=1)][:, table.any(axis=0)].astype(np.int64)
    several = min(full.shape) > 1
    chance = float(expected_mutual_information(full, int(full.sum()))) if several else 0.0
    score = partial(adjusted_mutual_information, chance=chance)
    value, redrawn = score(table), score(patches.resample(resamples, seed=seed + 1))
    low, high = bootstrap.basic_interval(value, redrawn, least=-1.0)

    def exchange(labels: np.ndarray) -> dict[str, np.ndarray]:
        """Compare with masks exchanged between images of the same label."""
        swap = bootstrap.Groups(labels).exchange
        null = bootstrap.repeat(lambda rng: patches.table(swap(rng)), times=permutations, seed=seed)
        return bootstrap.against_chance(value, score(null))

    everywhere, within = exchange(np.zeros_like(patches.labels)), exchange(patches.labels)
    numbers = {"ami": value, "low": low, "high": high, **everywhere}
    numbers |= {f"class_{name}": within[name] for name in ("null_mean", "null_high", "p")}
    row = {"experts": patches.shape[0], "parts": int(table.any(axis=0).sum())}
    row |= {"images": len(patches.experts), "tokens": int(table.sum())}
    return row | {name: float(number) for name, number in numbers.items()} | {"seed": seed}


def _describe(images: ImageSet) -> str:
    return f"Patch tokens of {len(images)} images; a patch shows the part that covers most of it."
