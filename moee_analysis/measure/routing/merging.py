"""Which patches become one token, and what they have in common."""

import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from moee_analysis.baselines.controls import randomly_merged
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing import bootstrap
from moee_analysis.measure.routing.inputs import Run, batches_of, check_any, model_of
from moee_analysis.measure.routing.part_alignment import all_patch_parts
from moee_analysis.measure.routing.routes import Routes, order_tokens, routes
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.capture import evaluating
from moee_analysis.models.merging import BLOCKS, merging_blocks, seeing_tokens, unmerged
from moee_analysis.moe.layer import moe_layers
from moee_analysis.utils.checks import draw_numbers

Tokens = dict[int, np.ndarray]
"""The token that each patch went into, int64 (images, rows, columns), by layer."""

Sums = dict[tuple[str, str], np.ndarray]
"""Of a quantity and a kind of pairs: the sum over each image's patches, and how many these are."""


def merging(
    model: Run,
    images: ImageSet,
    *,
    routed: Routes | None = None,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How many tokens are left in each layer, and what the patches of one token have in common.

    Experts are those that each patch would go to by itself: the run's own, with nothing merged, or
    those of ``routed`` (routes of the same images by a system whose tokens do not merge).

    Columns: ``layer``, ``merges`` (in its block), ``quantity``, ``pairs``, ``value``, ``low``,
    ``high`` (95 % bootstrap interval over images). Quantities of an image: ``tokens`` left of its
    patches, share of patches that stand ``alone``, patches of the ``largest`` token. The others
    are of patches that do not stand alone, each with every other patch of its token: share of the
    same ``part`` (where images have part masks), of the same ``expert`` (where a layer's patches go
    to one each, and to several), ``distance`` (between their middles, in patches). ``pairs`` are
    ``merged``; or the null, ``random``: as many merges of random tokens, or the same patch with
    every other one of its image; or ``neighbours``: the same patch with those that touch its sides.
    Raises MoeeError: no images, a model whose tokens do not merge, routes of other images, no
    resamples.
    """
    model = model_of(model)
    draw_numbers(seed, resamples=resamples)
    check_any(images)
    if routed is not None and routed.n_images != len(images):
        expected, hint = f"routes of the same {len(images)} images", "route those passed here"
        raise MoeeError(expected, f"routes of {routed.n_images}", hint)
    chance = token_places(randomly_merged(model, seed=seed), images)
    tokens, schedule = token_places(model, images), merging_blocks(model).schedule
    if routed is None and moe_layers(model):
        with unmerged(model):
            routed = routes(model, images)
    parts = {"part": all_patch_parts(images, tokens[0].shape[1:])} if images.parts else {}
    weights = bootstrap.redraw_counts(len(images), resamples, seed=seed)
    rows = []
    for layer, places in tokens.items():
        found = _sizes(places, "merged") | _sizes(chance[layer], "random")
        found |= _in_common(places, parts | _experts(routed, layer))
        for (quantity, pairs), sums in found.items():
            row = {"layer": layer, "merges": schedule[layer], "quantity": quantity, "pairs": pairs}
            rows.append(row | _mean(sums, weights))
    return add_caption(
        pd.DataFrame(rows),
        f"{len(images)} images. Random: as many random merges, or the same patch with any other of "
        f"its image; neighbours: with those that touch it. {resamples} resamples of images.",
    )


def token_places(model: Run, images: ImageSet) -> Tokens:
    """Say which token each patch of ``images`` went into, after the merging in each block.

    Patches of one token have the same number; numbers mean nothing from layer to layer. Where
    nothing has merged yet, every patch has one of its own.
    Raises MoeeError: no images, a model whose tokens do not merge.
    """
    model = model_of(model)
    check_any(images)
    if (blocks := merging_blocks(model)) is None:
        hint = 'extract with merging="budget", or merge with baselines.token_merging'
        raise MoeeError("a model whose tokens merge", f"a {type(model).__name__}", hint)
    names = {number: f"{BLOCKS}.{number}" for number in range(len(blocks))}
    leading, count = model.num_prefix_tokens, model.patch_embed.num_patches
    order, grid = order_tokens(model, names[0], (1, leading + count), leading=leading)
    parts: dict[int, list[np.ndarray]] = {layer: [] for layer in names}
    with evaluating(model), seeing_tokens(model, names.values()) as left:
        for x in batches_of(model, images, label="merging"):
            model(x)
            for layer, name in names.items():
                first = np.tile(np.arange(leading + count), (len(x), 1))
                place = left[name].place
                seen = first if place is None else place.cpu().numpy()
                parts[layer].append(seen[:, order[leading:]].reshape(len(x), *grid))
    return {layer: np.concatenate(each) for layer, each in parts.items()}


def _experts(routed: Routes | None, layer: int) -> dict[str, np.ndarray]:
    """Expert of every patch, int16 (images, rows, columns), where they go to several."""
    if routed is None or layer not in routed.placed:
        return {}
    experts = routed.patch_experts(layer)
    return {"expert": experts} if experts.min() < experts.max() else {}


def _sizes(places: np.ndarray, pairs: str) -> Sums:
    """How many tokens are left, patches alone in one, and those of the largest."""
    counts = [np.unique(image, return_counts=True)[1] for image in places]
    ones, patches = np.ones(len(places)), np.full(len(places), places[0].size)
    alone = np.array([(each == 1).sum() for each in counts])
    largest = np.array([each.max() for each in counts])
    found = {("alone", pairs): (alone, patches), ("largest", pairs): (largest, ones)}
    if pairs == "merged":  # there are as many by chance
        found["tokens", pairs] = np.array([len(each) for each in counts]), ones
    return {key: np.array(sums) for key, sums in found.items()}


def _in_common(places: np.ndarray, labels: dict[str, np.ndarray]) -> Sums:
    """What every patch that does not stand alone shares with others of its token, and of chance."""
    distance = _distances(places.shape[1:])
    others = {"random": distance > 0, "neighbours": distance == 1}
    found: dict[tuple[str, str], list] = {}
    for number, image in enumerate(places.reshape(len(places), -1)):
        merged = (image[:, None] == image) & (distance > 0)
        asked = merged.any(axis=1)
        flat = {name: each[number].ravel() for name, each in labels.items()}
        shared = {name: own[:, None] == own for name, own in flat.items()}
        for quantity, values in (shared | {"distance": distance}).items():
            for pairs, which in ({"merged": merged} | others).items():
                of_patch = (values * which).sum(axis=1)[asked] / which.sum(axis=1)[asked]
                found.setdefault((quantity, pairs), []).append((of_patch.sum(), asked.sum()))
    return {key: np.array(sums).T for key, sums in found.items()}


def _distances(grid: tuple[int, int]) -> np.ndarray:
    """Distances between the middles of patches, in patches, (patches, patches)."""
    places = np.argwhere(np.ones(grid))
    return cdist(places, places)


def _mean(sums: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    """The mean over patches of all images, and its interval; unknown where there are none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        total, count = sums.sum(axis=1)
        redrawn = np.divide(*(weights @ sums.T).T)
        low, high = np.nanquantile(redrawn, bootstrap.MIDDLE) if count else (np.nan, np.nan)
        return {"value": float(total / count), "low": float(low), "high": float(high)}
