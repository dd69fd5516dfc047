"""How differently two classes are routed, and whether classes that are alike are routed alike."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import against_chance, jensen_shannon
from moee_analysis.measure.routing.resolve import choose_classes, choose_layers, families_of
from moee_analysis.measure.routing.routes import Routes, Source, all_routes
from moee_analysis.measure.routing.tables import add_caption, similarity_rank, stack_layers, sum_up
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
    with the other half of its partner, mean of ``splits``. A class compared with itself therefore
    shows what the choice of images alone makes of the same number of images: the floor. Without
    ``classes`` those with fewer than two images are left out; ``families`` of the classes by their
    name add columns.

    Columns: ``system``, ``layer``, ``class_index_a``, ``class_index_b``, ``class_a``, ``class_b``
    (every ordered pair, also of a class with itself), ``js`` (bits), ``floor`` (mean of the two
    classes' own ``js``), ``order_a``, ``order_b`` (position for a heat map: by family, else by
    similarity), and with ``families`` also ``family_a``, ``family_b``, ``same_family``.
    Raises MoeeError: a chosen class with fewer than two images or without a family, an unknown
    layer.
    """
    draw_numbers(seed, splits=splits)
    several = all_routes(source, images)
    tables = []
    for routes in several:
        shown = _choose_divisible(routes, classes)
        wanted = choose_layers(routes.layers, layers)
        js = _compare_halves(routes, shown, wanted, (splits, seed))
        tables.append(_pairs(routes, shown, dict(zip(wanted, js, strict=True)), families))
    return add_caption(
        pd.concat(tables, ignore_index=True),
        f"Jensen-Shannon divergence between half of the images of one class and half of those "
        f"of another, mean of {splits} splits of {several[0].n_images} images, seed {seed}. "
        "The diagonal compares two halves of the same class.",
    )


def class_relatedness(
    table: pd.DataFrame, model: nn.Module, *, permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Rank correlation between routing distance and classifier distance, over pairs of classes.

    ``table`` is of :func:`class_distance`. Classifier distance is one minus the cosine of the two
    classes' rows of the last linear layer of the dense ``model``: it needs no list of families.
    Chance is a Mantel test: classes are permuted as a whole, since pairs that share a class are not
    independent.

    Columns: ``system``, ``layer``, ``spearman``, ``null_mean``, ``null_high`` (95 %), ``p``
    (one-sided), ``excess``, ``classes``.
    Raises MoeeError: fewer than four classes, a model without a linear classifier, no permutations.
    """
    draw_numbers(seed, permutations=permutations)

    def relate(part: pd.DataFrame) -> dict[str, float]:
        square = part.pivot(index="class_index_a", columns="class_index_b", values="js")
        if len(square) < 4:
            raise MoeeError("at least four classes", str(len(square)), "show more classes")
        own = _classifier_distance(model, square.index.to_numpy())
        found = _mantel(square.to_numpy(), own, permutations, np.random.default_rng(seed))
        return found | {"classes": len(square)}

    return sum_up(table, relate)


def _choose_divisible(routes: Routes, wanted: Sequence[int | str]) -> list[int]:
    """The classes that can be halved."""
    classes = choose_classes(routes.class_names, wanted)
    lone = [c for c in classes if (routes.labels == c).sum() < 2]
    if len(lone) == len(classes) or (wanted and lone):
        raise MoeeError(
            "at least two images of every class", f"one of {routes.class_names[lone[0]]}",
            "add images or choose other classes",
        )  # fmt: skip
    return [c for c in classes if c not in lone]


def _compare_halves(
    routes: Routes, classes: list[int], layers: list[int], plan: tuple[int, int]
) -> np.ndarray:
    """Mean divergence between opposite halves: (layers, classes, classes), symmetric."""
    splits, seed = plan
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(routes.labels == c) for c in classes]
    shares = [routes.image_shares(layer) for layer in layers]
    total = np.zeros((len(layers), len(classes), len(classes)))
    for _ in range(splits):
        mixed = [rng.permutation(images) for images in members]
        for place, share in enumerate(shares):
            one = np.stack([share[m[: len(m) // 2]].mean(axis=0) for m in mixed])
            two = np.stack([share[m[len(m) // 2 :]].mean(axis=0) for m in mixed])
            total[place] += jensen_shannon(one[:, None], two[None])
    return (total + total.transpose(0, 2, 1)) / (2 * splits)


def _pairs(
    routes: Routes,
    classes: list[int],
    distances: Mapping[int, np.ndarray],
    families: Mapping[str, str] | None,
) -> pd.DataFrame:
    """All pairs of classes, by the ``distances`` (classes, classes) of each layer."""
    names = [routes.class_names[c] for c in classes]
    own = pd.DataFrame({"class_index": classes, "class": names})
    if families is None:
        mean = np.mean(list(distances.values()), axis=0)
        own["order"] = similarity_rank(mean, distances=True)
    else:
        own["family"] = families_of(names, families)
        by_family = own["family"].factorize()[0].argsort(kind="stable")
        own["order"] = by_family.argsort()
    pairs = own.merge(own, how="cross", suffixes=("_a", "_b"))
    pairs[["js", "floor"]] = 0.0
    columns = ["class_index_a", "class_index_b", "class_a", "class_b", "js", "floor"]
    columns += ["order_a", "order_b"]
    if families is not None:
        pairs["same_family"] = pairs["family_a"] == pairs["family_b"]
        columns += ["family_a", "family_b", "same_family"]
    tables = []
    for layer, js in distances.items():
        floor = np.add.outer(np.diag(js), np.diag(js)) / 2
        table = pairs[columns].assign(js=js.ravel(), floor=floor.ravel())
        tables.append((routes.system, layer, table))
    return stack_layers(tables)


def _classifier_distance(model: nn.Module, classes: np.ndarray) -> np.ndarray:
    weight = getattr(model.get_classifier(), "weight", None)
    if weight is None:
        raise MoeeError(
            "a model with one linear classifier", type(model.get_classifier()).__name__,
            "leave this measure out for this model",
        )  # fmt: skip
    rows = weight.detach().cpu().double().numpy()[classes]
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return 1 - rows @ rows.T


def _mantel(
    one: np.ndarray, other: np.ndarray, permutations: int, rng: np.random.Generator
) -> dict[str, float]:
    pairs = np.triu_indices(len(one), k=1)
    ranks = rankdata(((one + one.T) / 2)[pairs])
    orders = [np.arange(len(one)), *(rng.permutation(len(one)) for _ in range(permutations))]
    values = [np.corrcoef(ranks, rankdata(other[np.ix_(o, o)][pairs]))[0, 1] for o in orders]
    chance = against_chance(np.array(values[0]), np.array(values[1:]))
    return {"spearman": float(values[0])} | {k: float(v) for k, v in chance.items()}
