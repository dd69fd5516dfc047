"""Which experts the images of a class use, how far that is from others, and which are alike."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing import bootstrap
from moee_analysis.measure.routing.inputs import choose_classes, choose_layers, families_of
from moee_analysis.measure.routing.routes import Routes, Source, all_routes
from moee_analysis.measure.routing.tables import add_caption, all_rows, order_alike, stack, sum_up
from moee_analysis.utils.checks import draw_numbers

ALL = "all"  # name of the row that stands for all classes together
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
    several, parts = all_routes(source, images), []
    for routes in several:
        shown, groups = choose_classes(routes.class_names, classes), bootstrap.Groups(routes.labels)
        rows = np.searchsorted(groups.classes, shown)
        for layer in choose_layers(routes.layers, layers):
            means = groups.means(routes.image_shares(layer), groups.order)  # (classes, experts)
            table = all_rows(class_index=shown, expert=range(means.shape[1]))
            table.insert(1, "class_name", table["class_index"].map(routes.class_names))
            table["share"], table["share_all"] = means[rows].ravel(), means.mean(0)[table["expert"]]
            table["images"] = np.repeat(groups.sizes[rows], means.shape[1])
            parts.append((routes.system, layer, table))
    return add_caption(stack(parts), f"Mean share of an image's tokens. {_describe(several)}")


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

    Columns: ``system``, ``layer``, ``class_index``, ``class_name``, ``images``, ``experts``, ``js``
    (Jensen-Shannon divergence in bits between the class and the mean over classes), ``corrected``
    (less the bias that the bootstrap over images of a class shows), ``low``, ``high`` (its 95 %
    basic bootstrap interval), ``null_mean``, ``null_high`` (95 %), ``p`` (one-sided), ``excess``
    (``js`` less ``null_mean``: cautious, for images of different classes differ more than those of
    one), ``seed``. The rows of class ``"all"`` (index -1) hold the mean over all classes.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    several, tables, draws = all_routes(source, images), [], (permutations, resamples, seed)
    for routes in several:
        shown, groups = choose_classes(routes.class_names, classes), bootstrap.Groups(routes.labels)
        table = _resample(routes, layers, _divergences, draws).rename(columns={"value": "js"})
        group = table.pop("group")  # the classes in order, and last all of them
        table.insert(2, "class_index", np.append(groups.classes, -1)[group])
        table.insert(3, "class_name", table["class_index"].map(routes.class_names | {-1: ALL}))
        table.insert(4, "images", np.append(groups.sizes, routes.n_images)[group])
        # a single image cannot be resampled
        table.loc[table["images"] < 2, ["corrected", "low", "high"]] = np.nan
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
    """How much the expert of a token says about the class of its image, of equal weights, by layer.

    Columns: ``system``, ``layer``, ``experts``, ``classes``, ``images``, ``information`` (mutual
    information of class and expert / entropy of the expert, 0 to 1), ``corrected``, ``low``,
    ``high``, ``null_mean``, ``null_high``, ``p``, ``excess``, ``seed``.
    """
    draw_numbers(seed, permutations=permutations, resamples=resamples)
    several, tables, draws = all_routes(source, images), [], (permutations, resamples, seed)
    for routes in several:
        table = _resample(routes, layers, _information, draws).drop(columns="group")
        table.insert(3, "classes", len(routes.class_names))
        table.insert(4, "images", routes.n_images)
        tables.append(table.rename(columns={"value": "information"}))
    return _finish(tables, several, draws)


def class_distance(
    source: Source,
    images: ImageSet | None = None,
    *,
    layers: Sequence[int] = (),
    classes: Sequence[int | str] = (),
    families: Mapping[str, str] | None = None,
    splits: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """Divergence of routing between every two classes, and within each class.

    The images of every class are split into random halves, and one half of a class is compared
    with the other half of its partner, mean of ``splits``. A class compared with itself shows what
    the choice of images alone makes of as many of them: the floor. Without ``classes`` those with
    fewer than two images are left out; ``families`` of the classes by their name add columns.

    Columns: ``system``, ``layer``, ``class_index_a``, ``class_index_b``, ``class_a``, ``class_b``
    (every ordered pair, also of a class with itself), ``js`` (bits), ``floor`` (mean of the two
    classes' own ``js``), ``order_a``, ``order_b`` (position for a heat map: by family, else by
    similarity), and with ``families`` also ``family_a``, ``family_b``.
    Raises MoeeError: a chosen class with fewer than two images, a class without a family.
    """
    draw_numbers(seed, splits=splits)
    several, parts = all_routes(source, images), []
    for routes in several:
        chosen = choose_classes(routes.class_names, classes)
        lone = [c for c in chosen if (routes.labels == c).sum() < 2]
        if len(lone) == len(chosen) or (classes and lone):
            found = f"one of {routes.class_names[lone[0]]}"
            hint = "add images or choose other classes"
            raise MoeeError("at least two images of every class", found, hint)
        shown = [c for c in chosen if c not in lone]
        wanted = choose_layers(routes.layers, layers)
        js = _compare_halves(routes, shown, wanted, splits=splits, seed=seed)
        pairs = _pair_classes(routes, shown, js.mean(axis=0), families)
        for layer, distances in zip(wanted, js, strict=True):
            own = np.diag(distances)
            floor = np.add.outer(own, own) / 2
            table = pairs.assign(js=distances.ravel(), floor=floor.ravel())
            parts.append((routes.system, layer, table))
    return add_caption(
        stack(parts),
        f"Jensen-Shannon divergence between half of the images of one class and half of those "
        f"of another, mean of {splits} splits of {several[0].n_images} images, seed {seed}. "
        "The diagonal compares two halves of the same class.",
    )


def class_relatedness(
    table: pd.DataFrame, model: nn.Module, *, permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Rank correlation between routing distance and classifier distance, over pairs of classes.

    ``table`` is of :func:`class_distance`. Classifier distance is one minus the cosine of the two
    classes' rows of the last linear layer of the dense ``model``. Chance is a Mantel test: classes
    are permuted as a whole, since pairs that share a class are not independent.

    Columns: ``system``, ``layer``, ``spearman``, ``null_mean``, ``null_high`` (95 %), ``p``
    (one-sided), ``excess``, ``classes``.
    Raises MoeeError: fewer than four classes, a model without a linear classifier, no permutations.
    """
    draw_numbers(seed, permutations=permutations)
    classifier = model.get_classifier()
    if getattr(classifier, "weight", None) is None:
        found, hint = type(classifier).__name__, "leave this measure out for this model"
        raise MoeeError("a model with one linear classifier", found, hint)
    rows = classifier.weight.detach().cpu().double().numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def relate(part: pd.DataFrame) -> dict[str, float]:
        square = part.pivot(index="class_index_a", columns="class_index_b", values="js")
        if len(square) < 4:
            raise MoeeError("at least four classes", str(len(square)), "show more classes")
        routed, own = square.to_numpy(), rows[square.index]
        other = 1 - own @ own.T
        pairs, rng = np.triu_indices(len(square), k=1), np.random.default_rng(seed)
        ranks = rankdata(((routed + routed.T) / 2)[pairs])
        orders = [rng.permutation(len(square)) for _ in range(permutations)]
        value, *null = (
            np.corrcoef(ranks, rankdata(other[np.ix_(order, order)][pairs]))[0, 1]
            for order in (np.arange(len(square)), *orders)
        )
        row = {"spearman": value} | bootstrap.against_chance(value, np.array(null))
        return {name: float(number) for name, number in row.items()} | {"classes": len(square)}

    return sum_up(table, relate)


def _divergences(means: np.ndarray) -> np.ndarray:
    """Divergence of each class from the mean over classes, and last their mean: (classes + 1,)."""
    each = bootstrap.jensen_shannon(means, means.mean(axis=0))
    return np.append(each, each.mean())


def _information(means: np.ndarray) -> np.ndarray:
    """I(class; expert) / H(expert) of classes of equal weight, (1,); 0 if there is one expert."""
    total = bootstrap.entropy(means.mean(axis=0))
    return np.array([1 - bootstrap.entropy(means).mean() / total if total > 0 else 0.0])


def _resample(
    routes: Routes, layers: Sequence[int], score: Callable[[np.ndarray], np.ndarray], draws: Draws
) -> pd.DataFrame:
    """Value, interval and null of a ``score`` (class means -> groups): a row per layer, group.

    All layers are drawn together, so that differences between layers are not those of draws.
    """
    shown = choose_layers(routes.layers, layers)
    shares = [routes.image_shares(layer) for layer in shown]
    experts = [share.shape[1] for share in shares]
    packed, groups = np.concatenate(shares, axis=1), bootstrap.Groups(routes.labels)

    def values(order: np.ndarray) -> np.ndarray:
        means = np.split(groups.means(packed, order), np.cumsum(experts)[:-1], axis=1)
        return np.stack([score(one) for one in means])  # (layers, groups)

    def redraw(order: Callable, times: int, seed: int) -> np.ndarray:
        return bootstrap.repeat(lambda rng: values(order(rng)), times=times, seed=seed)

    permutations, resamples, seed = draws
    value, null = values(groups.order), redraw(groups.shuffle, permutations, seed)
    resampled = redraw(groups.resample, resamples, seed + 1)
    low, high = bootstrap.basic_interval(value, resampled)
    corrected = np.maximum(2 * value - resampled.mean(axis=0), 0)
    columns = {"value": value, "corrected": corrected, "low": low, "high": high}
    columns |= bootstrap.against_chance(value, null)
    table = all_rows(layer=shown, group=range(value.shape[1]))
    table.insert(0, "system", routes.system)
    table.insert(2, "experts", np.repeat(experts, value.shape[1]))
    return table.assign(**{name: array.ravel() for name, array in columns.items()})


def _finish(tables: list[pd.DataFrame], several: list[Routes], draws: Draws) -> pd.DataFrame:
    permutations, resamples, seed = draws
    return add_caption(
        pd.concat(tables, ignore_index=True).assign(seed=seed),
        f"{_describe(several)} Null: {permutations} permutations of the images' labels; "
        f"intervals: {resamples} bootstrap resamples of images; seed {seed}.",
    )


def _describe(several: list[Routes]) -> str:
    images, classes = several[0].n_images, len(several[0].class_names)
    return f"All tokens of {images} images of {classes} classes, every class with the same weight."


def _compare_halves(
    routes: Routes, classes: list[int], layers: list[int], *, splits: int, seed: int
) -> np.ndarray:
    """Mean divergence between opposite halves: (layers, classes, classes), symmetric."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(routes.labels == c) for c in classes]
    shares = [routes.image_shares(layer) for layer in layers]
    total = np.zeros((len(layers), len(classes), len(classes)))
    for _ in range(splits):
        mixed = [rng.permutation(images) for images in members]
        for place, share in enumerate(shares):
            one = np.stack([share[m[: len(m) // 2]].mean(axis=0) for m in mixed])
            two = np.stack([share[m[len(m) // 2 :]].mean(axis=0) for m in mixed])
            total[place] += bootstrap.jensen_shannon(one[:, None], two[None])
    return (total + total.transpose(0, 2, 1)) / (2 * splits)


def _pair_classes(
    routes: Routes, classes: list[int], distances: np.ndarray, families: Mapping[str, str] | None
) -> pd.DataFrame:
    """All pairs of classes, those of a family or of small ``distances`` side by side."""
    names = [routes.class_names[c] for c in classes]
    own = pd.DataFrame({"class_index": classes, "class": names})
    if families is None:
        own["order"] = order_alike(distances, distances=True)
    else:
        family = pd.Series(families_of(names, families))
        own["order"] = family.factorize()[0].argsort(kind="stable").argsort()
        own["family"] = family
    columns = [f"{name}_{side}" for name in own for side in "ab"]
    columns[4:4] = ["js", "floor"]  # which differ from layer to layer
    return own.merge(own, how="cross", suffixes=("_a", "_b")).reindex(columns=columns)
