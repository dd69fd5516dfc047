"""Which experts the images of a class use, and how far that is from what all images use."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from moee_analysis.data.images import ImageSet
from moee_analysis.measure.routing.bootstrap import (
    Groups,
    against_chance,
    basic_interval,
    entropy,
    jensen_shannon,
    repeat,
)
from moee_analysis.measure.routing.resolve import choose_classes, choose_layers
from moee_analysis.measure.routing.routes import Routes, Source, all_routes
from moee_analysis.measure.routing.tables import add_caption, all_rows, stack_layers
from moee_analysis.utils.checks import draw_numbers

ALL = "all"
"""Name of the row that stands for all classes together."""

Draws = tuple[int, int, int]  # permutations, resamples, seed


def class_routing(
    source: Source,
    images: ImageSet | None = None,
    *,
    classes: Sequence[int | str] = (),
    layers: Sequence[int] = (),
) -> pd.DataFrame:
    """How the tokens of each class fall on the experts, next to those of all classes.

    Columns: ``system``, ``layer``, ``class_index``, ``class_name``, ``expert``, ``share`` (mean
    over the images of the class of the expert's share of tokens; of choices, where a token has
    several experts), ``share_all`` (the same, mean over all classes), ``images`` (of the class).
    Raises MoeeError: a class without images, a layer without experts, a run without images.
    """
    several = all_routes(source, images)
    table = stack_layers(
        (routes.system, layer, _class_shares(routes, layer, classes))
        for routes in several
        for layer in choose_layers(routes.layers, layers)
    )
    return add_caption(table, f"Mean share of an image's tokens. {_describe_images(several)}")


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
    stands next to what it comes to when the images' labels are permuted; ``resamples`` are of the
    images within each class. The comparison is with all classes, also if few are shown.

    Columns: ``system``, ``layer``, ``class_index``, ``class_name``, ``images``, ``experts``, ``js``
    (Jensen-Shannon divergence in bits between the class and the mean over classes), ``corrected``
    (less the bias that the bootstrap over images shows), ``low``, ``high`` (95 % basic bootstrap
    interval, of ``corrected``), ``null_mean``, ``null_high`` (95 %), ``p`` (one-sided), ``excess``
    (``js`` less ``null_mean``: cautious, for images of different classes differ more than those of
    one), ``seed``. The rows of class ``"all"`` (index -1) hold the mean over all classes.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    draws = permutations, resamples, seed
    several, tables = all_routes(source, images), []
    for routes in several:
        shown = choose_classes(routes.class_names, classes)
        table = _name_groups(routes, _resample(routes, layers, _divergences, draws))
        tables.append(table[table["class_index"].isin([-1, *shown])])
    return _finish(tables, several, draws)


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

    All classes weigh the same.

    Columns: ``system``, ``layer``, ``experts``, ``classes``, ``images``, ``information`` (mutual
    information of class and expert / entropy of the expert, 0 to 1), ``corrected``, ``low``,
    ``high``, ``null_mean``, ``null_high``, ``p``, ``excess``, ``seed``.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    draws = permutations, resamples, seed
    several, tables = all_routes(source, images), []
    for routes in several:
        table = _resample(routes, layers, _information, draws).drop(columns="group")
        table.insert(3, "classes", len(routes.class_names))
        table.insert(4, "images", routes.n_images)
        tables.append(table.rename(columns={"value": "information"}))
    return _finish(tables, several, draws)


def _class_shares(routes: Routes, layer: int, wanted: Sequence[int | str]) -> pd.DataFrame:
    classes, groups = choose_classes(routes.class_names, wanted), Groups.of(routes.labels)
    means = groups.means(routes.image_shares(layer))  # (classes, experts)
    rows, experts = np.searchsorted(groups.classes, classes), range(means.shape[1])
    table = all_rows(class_index=classes, expert=experts)
    table.insert(1, "class_name", table["class_index"].map(routes.class_names))
    return table.assign(
        share=means[rows].ravel(),
        share_all=means.mean(axis=0)[table["expert"]],
        images=np.repeat(groups.sizes[rows], len(experts)),
    )


def _divergences(means: np.ndarray) -> np.ndarray:
    """Divergence of each class from the mean over classes, and last their mean: (classes + 1,)."""
    each = jensen_shannon(means, means.mean(axis=0))
    return np.append(each, each.mean())


def _information(means: np.ndarray) -> np.ndarray:
    """I(class; expert) / H(expert) of classes of equal weight, (1,); 0 if there is one expert."""
    total = entropy(means.mean(axis=0))
    return np.array([1 - entropy(means).mean() / total if total > 0 else 0.0])


def _resample(
    routes: Routes,
    layers: Sequence[int],
    statistic: Callable[[np.ndarray], np.ndarray],
    draws: Draws,
) -> pd.DataFrame:
    """Value, interval and null of ``statistic`` (class means -> groups): a row per layer, group.

    All layers are drawn together, so that differences between layers are not those of draws.
    """
    shown = choose_layers(routes.layers, layers)
    shares = [routes.image_shares(layer) for layer in shown]
    experts = [share.shape[1] for share in shares]
    packed, groups = np.concatenate(shares, axis=1), Groups.of(routes.labels)

    def values(order: np.ndarray | None) -> np.ndarray:
        means = np.split(groups.means(packed, order), np.cumsum(experts)[:-1], axis=1)
        return np.stack([statistic(one) for one in means])  # (layers, groups)

    permutations, resamples, seed = draws
    value = values(None)
    null = repeat(values, groups.shuffled, times=permutations, seed=seed)
    resampled = repeat(values, groups.resampled, times=resamples, seed=seed + 1)
    low, high = basic_interval(value, resampled)
    corrected = np.maximum(2 * value - resampled.mean(axis=0), 0)
    columns = {"value": value, "corrected": corrected, "low": low, "high": high}
    columns |= against_chance(value, null)
    table = all_rows(layer=shown, group=range(value.shape[1]))
    table.insert(0, "system", routes.system)
    table.insert(2, "experts", np.repeat(experts, value.shape[1]))
    return table.assign(**{name: array.ravel() for name, array in columns.items()})


def _name_groups(routes: Routes, table: pd.DataFrame) -> pd.DataFrame:
    """Name the groups: the classes in order, and last all of them."""
    groups = Groups.of(routes.labels)
    names = [*(routes.class_names[int(c)] for c in groups.classes), ALL]
    group = table["group"].to_numpy()
    table = table.rename(columns={"value": "js"}).drop(columns="group")
    table.insert(2, "class_index", np.append(groups.classes, -1)[group])
    table.insert(3, "class_name", np.array(names)[group])
    table.insert(4, "images", np.append(groups.sizes, routes.n_images)[group])
    table.loc[table["images"] < 2, ["corrected", "low", "high"]] = np.nan  # cannot be resampled
    return table


def _finish(tables: list[pd.DataFrame], several: list[Routes], draws: Draws) -> pd.DataFrame:
    permutations, resamples, seed = draws
    return add_caption(
        pd.concat(tables, ignore_index=True).assign(seed=seed),
        f"{_describe_images(several)} Null: {permutations} permutations of the images' labels; "
        f"intervals: {resamples} bootstrap resamples of images; seed {seed}.",
    )


def _describe_images(several: list[Routes]) -> str:
    first = several[0]
    return (
        f"All tokens of {first.n_images} images of {len(first.class_names)} classes, "
        "every class with the same weight."
    )
