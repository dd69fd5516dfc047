"""How differently two classes are routed, and whether related classes are routed alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from scipy.stats import rankdata

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import against_chance
from moee_analysis.measure.routing.divergence import image_shares, jensen_shannon
from moee_analysis.measure.routing.resolve import (
    Source,
    all_routes,
    chosen_classes,
    chosen_layers,
    families_of,
)
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.utils.checks import draw_numbers


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
    with the other half of its partner. A class compared with itself therefore shows what the
    choice of images alone makes of the same number of images: the floor.

    Parameters
    ----------
    source, layers, classes
        As in ``class_routing``, but without ``classes``
        those with fewer than two images are left out.
    families
        Family of each class by its name; adds a column.
    splits, seed
        Random splits into halves, over which the divergence is averaged.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``class_index_a``, ``class_index_b``, ``class_a``, ``class_b``
        (every ordered pair, also of a class with itself), ``js`` (bits), ``floor`` (mean of the
        two classes' own ``js``), ``order_a``, ``order_b`` (position for a heat map: by family,
        else by similarity), and with ``families`` also ``family_a``, ``family_b``,
        ``same_family``.

    Raises
    ------
    MoeeError
        A chosen class with fewer than two images or without a family, an unknown layer.
    """
    draw_numbers(seed, splits=splits)
    several = all_routes(source, images)
    table = pd.concat(
        [_distances(routes, layers, classes, families, (splits, seed)) for routes in several],
        ignore_index=True,
    )
    first = several[0]
    table.attrs["caption"] = (
        f"Jensen-Shannon divergence between half of the images of one class and half of those "
        f"of another, mean of {splits} splits of {first.n_images} images, seed {seed}. "
        "The diagonal compares two halves of the same class."
    )
    return table


def family_separation(
    table: pd.DataFrame, *, permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Whether classes of the same family are nearer to each other than to other classes.

    Parameters
    ----------
    table
        Of :func:`class_distance` with families.
    permutations, seed
        Of the families among the classes: the null of ``auc``.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``auc`` (probability that a pair of the same family is nearer
        than a pair of different ones; 0.5 is chance), ``null_mean``, ``null_high``, ``p``,
        ``excess``, ``mean_same``, ``mean_other`` (bits), ``ratio`` (other / same), ``floor``
        (mean divergence within a class), ``pairs_same``, ``pairs_other``.

    Raises
    ------
    MoeeError
        A table without families, or in which no two classes share one (or all do); no permutations.
    """
    draw_numbers(seed, permutations=permutations)
    if "same_family" not in table:
        raise MoeeError(
            "a table of class_distance with families", "no column 'same_family'",
            "call class_distance(..., families={class name: family})",
        )  # fmt: skip
    groups = table.groupby(["system", "layer"], sort=False)
    rows = [
        {"system": system, "layer": layer} | _separation(part, permutations, seed)
        for (system, layer), part in groups
    ]
    result = pd.DataFrame(rows)
    result.attrs["caption"] = (
        f"Pairs of classes of the same family against pairs of different families. Null: "
        f"{permutations} permutations of the families among the classes, seed {seed}."
    )
    return result


def _distances(
    routes: Routes,
    layers: Sequence[int],
    classes: Sequence[int | str],
    families: Mapping[str, str] | None,
    plan: tuple[int, int],
) -> pd.DataFrame:
    shown = _divisible(routes, chosen_classes(routes.class_names, classes), named=bool(classes))
    names = [routes.class_names[c] for c in shown]
    family = None if families is None else families_of(names, families)
    wanted = chosen_layers(routes.layers, layers)
    js = _halves(routes, shown, wanted, plan)  # (layers, classes, classes)
    order = np.empty(len(shown), dtype=np.int64)
    order[_sorted(js.mean(axis=0), family)] = np.arange(len(shown))
    tables = [
        _pairs(one, shown, names, order).assign(system=routes.system, layer=layer)
        for layer, one in zip(wanted, js, strict=True)
    ]
    table = pd.concat(tables, ignore_index=True)
    if family is not None:
        lookup = dict(zip(names, family, strict=True))
        table["family_a"], table["family_b"] = (table[c].map(lookup) for c in _PAIR)
        table["same_family"] = table["family_a"] == table["family_b"]
    return table[["system", "layer", *(c for c in table if c not in {"system", "layer"})]]


_PAIR = ("class_a", "class_b")


def _divisible(routes: Routes, classes: list[int], *, named: bool) -> list[int]:
    """Return the classes that can be halved."""
    sizes = {c: int((routes.labels == c).sum()) for c in classes}
    lone = [c for c in classes if sizes[c] < 2]
    if len(lone) == len(classes) or (named and lone):
        raise MoeeError(
            "at least two images of every class", f"one of {routes.class_names[lone[0]]}",
            "add images or choose other classes",
        )  # fmt: skip
    return [c for c in classes if sizes[c] >= 2]


def _halves(
    routes: Routes, classes: list[int], layers: list[int], plan: tuple[int, int]
) -> np.ndarray:
    """Mean divergence between opposite halves: (layers, classes, classes), symmetric."""
    splits, seed = plan
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(routes.labels == c) for c in classes]
    shares = [image_shares(routes, layer) for layer in layers]
    total = np.zeros((len(layers), len(classes), len(classes)))
    for _ in range(splits):
        mixed = [rng.permutation(images) for images in members]
        for place, share in enumerate(shares):
            one = np.stack([share[m[: len(m) // 2]].mean(axis=0) for m in mixed])
            two = np.stack([share[m[len(m) // 2 :]].mean(axis=0) for m in mixed])
            total[place] += jensen_shannon(one[:, None], two[None])
    return (total + total.transpose(0, 2, 1)) / (2 * splits)


def _sorted(js: np.ndarray, family: list[str] | None) -> np.ndarray:
    """Return the classes in the order of a heat map."""
    if family is not None:
        first = {name: family.index(name) for name in family}
        return np.array(sorted(range(len(js)), key=lambda c: (first[family[c]], c)))
    if len(js) < 3:
        return np.arange(len(js))
    apart = squareform(js * (1 - np.eye(len(js))), checks=False)
    return leaves_list(linkage(apart, "average", optimal_ordering=True))


def _pairs(js: np.ndarray, classes: list[int], names: list[str], order: np.ndarray) -> pd.DataFrame:
    a, b = (index.ravel() for index in np.indices(js.shape))
    own = np.diag(js)
    name, index = np.array(names), np.array(classes)
    return pd.DataFrame(
        {
            "class_index_a": index[a],
            "class_index_b": index[b],
            "class_a": name[a],
            "class_b": name[b],
            "js": js.ravel(),
            "floor": (own[a] + own[b]) / 2,
            "order_a": order[a],
            "order_b": order[b],
        }
    )


def _separation(part: pd.DataFrame, permutations: int, seed: int) -> dict[str, float]:
    js = part.pivot(index="order_a", columns="order_b", values="js").to_numpy()
    family = part.drop_duplicates("order_a").sort_values("order_a")["family_a"].to_numpy()
    upper = np.triu_indices(len(js), 1)
    pairs = js[upper]
    same = (family[:, None] == family)[upper]
    if same.all() or not same.any():
        raise MoeeError(
            "pairs of the same and of different families",
            f"{same.sum()} of {len(same)} pairs in the same family",
            "choose classes of at least two families, two of them in one",
        )
    ranks, rng = rankdata(pairs), np.random.default_rng(seed)
    shuffled = (rng.permutation(family) for _ in range(permutations))
    null = np.array([_auc(ranks, (f[:, None] == f)[upper]) for f in shuffled])
    auc = _auc(ranks, same)
    means = {"mean_same": pairs[same].mean(), "mean_other": pairs[~same].mean()}
    return (
        {"auc": auc}
        | {name: float(value) for name, value in against_chance(np.array(auc), null).items()}
        | means
        | {
            "ratio": means["mean_other"] / means["mean_same"],
            "floor": np.diag(js).mean(),
            "pairs_same": int(same.sum()),
            "pairs_other": int((~same).sum()),
        }
    )


def _auc(ranks: np.ndarray, same: np.ndarray) -> float:
    """Probability that a pair of the same family ranks below another (ties count half)."""
    n, m = same.sum(), (~same).sum()
    return float(1 - (ranks[same].sum() - n * (n + 1) / 2) / (n * m))
