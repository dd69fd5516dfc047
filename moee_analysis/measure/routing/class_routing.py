"""Which experts the images of a class use, and how far that is from what all images use."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.measure.routing.bootstrap import Groups, against_chance, basic_interval, repeat
from moee_analysis.measure.routing.divergence import entropy, image_shares, jensen_shannon
from moee_analysis.measure.routing.resolve import Source, all_routes, chosen_classes, chosen_layers
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.utils.checks import draw_numbers

ALL = "all"
"""Name of the row that stands for all classes together."""


def class_routing(
    source: Source,
    images: ImageSet | None = None,
    *,
    classes: Sequence[int | str] = (),
    layers: Sequence[int] = (),
) -> pd.DataFrame:
    """How the tokens of each class fall on the experts, next to those of all classes.

    Parameters
    ----------
    source
        A run (with ``images``), its routes, or the routes of several systems.
    classes
        Names or indices of the classes to show; empty: all.
    layers
        Layers to show, counted from 0; empty: all.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``class_index``, ``class_name``, ``expert``, ``share`` (mean over
        the images of the class of the expert's share of tokens; of choices, where a token has
        several experts), ``share_all`` (the same, mean over all classes), ``images`` (of the
        class).

    Raises
    ------
    MoeeError
        A class without images, a layer without experts, a run without images.
    """
    several = all_routes(source, images)
    tables = [
        _class_routing(routes, layer, chosen_classes(routes.class_names, classes))
        for routes in several
        for layer in chosen_layers(routes.layers, layers)
    ]
    table = pd.concat(tables, ignore_index=True)
    table.attrs["caption"] = f"Mean share of an image's tokens. {_images_text(several)}"
    return table


def specificity(
    source: Source,
    images: ImageSet | None = None,
    *,
    classes: Sequence[int | str] = (),
    layers: Sequence[int] = (),
    permutations: int = 200,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How specific to a class its routing is: its divergence from the routing of all classes.

    The divergence is biased upwards, more so with many experts and few images, so each value
    stands next to what it comes to when the images' labels are permuted.

    Parameters
    ----------
    source, classes, layers
        As in :func:`class_routing`. The comparison is with all classes, also if few are shown.
    permutations, resamples, seed
        Of the image labels (null) and of the images within each class (interval).

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``class_index``, ``class_name``, ``images``, ``experts``, ``js``
        (Jensen-Shannon divergence in bits between the class and the mean over classes),
        ``corrected`` (less the bias that the bootstrap over images shows), ``low``, ``high``
        (95 % basic bootstrap interval, of ``corrected``), ``null_mean``, ``null_high`` (95 %),
        ``p`` (one-sided), ``excess`` (``js`` less ``null_mean``: cautious, for images of
        different classes differ more than those of one), ``seed``. The rows of class ``"all"``
        (index -1) hold the mean over all classes.

    Raises
    ------
    MoeeError
        As :func:`class_routing`; fewer than one permutation or resample.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    several = all_routes(source, images)
    tables = []
    for routes in several:
        shown = chosen_classes(routes.class_names, classes)
        facts = _resampled(routes, layers, _divergences, (permutations, resamples, seed))
        table = _with_classes(routes, facts)
        tables.append(table[table["class_index"].isin([-1, *shown])])
    table = pd.concat(tables, ignore_index=True)
    table["seed"] = seed
    table.attrs["caption"] = (
        f"{_images_text(several)} Null: {permutations} permutations of the images' labels; "
        f"intervals: {resamples} bootstrap resamples of images; seed {seed}."
    )
    return table


def class_information(
    source: Source,
    images: ImageSet | None = None,
    *,
    layers: Sequence[int] = (),
    permutations: int = 200,
    resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How much the expert of a token says about the class of its image, per layer.

    All classes weigh the same. Parameters as in :func:`specificity`.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``experts``, ``classes``, ``images``, ``information``
        (mutual information of class and expert / entropy of the expert, 0 to 1),
        ``corrected``, ``low``, ``high``, ``null_mean``, ``null_high``, ``p``, ``excess``, ``seed``.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    several = all_routes(source, images)
    tables = []
    for routes in several:
        facts = _resampled(routes, layers, _information, (permutations, resamples, seed))
        facts.insert(3, "classes", len(routes.class_names))
        facts.insert(4, "images", routes.n_images)
        tables.append(facts.drop(columns="group").rename(columns={"value": "information"}))
    table = pd.concat(tables, ignore_index=True)
    table["seed"] = seed
    table.attrs["caption"] = (
        f"{_images_text(several)} Null: {permutations} permutations of the images' labels; "
        f"intervals: {resamples} bootstrap resamples of images; seed {seed}."
    )
    return table


def _class_routing(routes: Routes, layer: int, classes: list[int]) -> pd.DataFrame:
    groups = Groups.of(routes.labels)
    means = groups.means(image_shares(routes, layer))  # (classes, experts)
    rows = np.searchsorted(groups.classes, classes)
    experts = means.shape[1]
    return pd.DataFrame(
        {
            "system": routes.system,
            "layer": layer,
            "class_index": np.repeat(classes, experts),
            "class_name": np.repeat([routes.class_names[c] for c in classes], experts),
            "expert": np.tile(np.arange(experts), len(classes)),
            "share": means[rows].ravel(),
            "share_all": np.tile(means.mean(axis=0), len(classes)),
            "images": np.repeat(groups.sizes[rows], experts),
        }
    )


def _divergences(means: np.ndarray) -> np.ndarray:
    """Divergence of each class from the mean over classes, and last their mean: (classes + 1,)."""
    each = jensen_shannon(means, means.mean(axis=0))
    return np.append(each, each.mean())


def _information(means: np.ndarray) -> np.ndarray:
    """I(class; expert) / H(expert) of classes of equal weight, (1,); 0 if there is one expert."""
    total = entropy(means.mean(axis=0))
    return np.array([1 - entropy(means).mean() / total if total > 0 else 0.0])


def _resampled(
    routes: Routes,
    layers: Sequence[int],
    statistic: Callable[[np.ndarray], np.ndarray],
    plan: tuple[int, int, int],
) -> pd.DataFrame:
    """Value, interval and null of ``statistic`` (class means -> groups): a row per layer, group.

    All layers are drawn together, so that differences between layers are not those of draws.
    ``plan`` is (permutations, resamples, seed).
    """
    shown = chosen_layers(routes.layers, layers)
    shares = [image_shares(routes, layer) for layer in shown]
    edges = np.cumsum([share.shape[1] for share in shares])[:-1]
    packed, groups = np.concatenate(shares, axis=1), Groups.of(routes.labels)

    def values(order: np.ndarray | None) -> np.ndarray:
        means = np.split(groups.means(packed, order), edges, axis=1)
        return np.stack([statistic(one) for one in means])  # (layers, groups)

    permutations, resamples, seed = plan
    value = values(None)
    null = repeat(values, groups.shuffled, times=permutations, seed=seed)
    resampled = repeat(values, groups.resampled, times=resamples, seed=seed + 1)
    low, high = basic_interval(value, resampled)
    corrected = np.maximum(2 * value - resampled.mean(axis=0), 0)
    n_groups = value.shape[1]
    facts = {"value": value, "corrected": corrected, "low": low, "high": high}
    facts |= against_chance(value, null)
    return pd.DataFrame(
        {
            "system": routes.system,
            "layer": np.repeat(shown, n_groups),
            "experts": np.repeat([share.shape[1] for share in shares], n_groups),
            "group": np.tile(np.arange(n_groups), len(shown)),
        }
        | {name: array.ravel() for name, array in facts.items()}
    )


def _with_classes(routes: Routes, facts: pd.DataFrame) -> pd.DataFrame:
    """Name the groups of ``facts``: the classes in order, and last all of them."""
    groups = Groups.of(routes.labels)
    names = [*(routes.class_names[int(c)] for c in groups.classes), ALL]
    group = facts["group"].to_numpy()
    table = facts.rename(columns={"value": "js"}).drop(columns="group")
    table.insert(2, "class_index", np.append(groups.classes, -1)[group])
    table.insert(3, "class_name", np.array(names)[group])
    table.insert(4, "images", np.append(groups.sizes, routes.n_images)[group])
    lone = table["images"] < 2  # a single image cannot be resampled
    table.loc[lone, ["corrected", "low", "high"]] = np.nan
    return table


def _images_text(several: list[Routes]) -> str:
    first = several[0]
    return (
        f"All tokens of {first.n_images} images of {len(first.class_names)} classes, "
        "every class with the same weight."
    )
