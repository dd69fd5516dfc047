"""Whether classes that the classifier holds to be alike are routed alike."""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import rankdata
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import against_chance
from moee_analysis.utils.checks import draw_numbers


def class_relatedness(
    table: pd.DataFrame, model: nn.Module, *, permutations: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Rank correlation between routing distance and classifier distance, over pairs of classes.

    Classifier distance is one minus the cosine of the two classes' rows of the last linear layer:
    it needs no list of families, so it works for any model. Chance is a Mantel test: classes
    are permuted as a whole, since pairs that share a class are not independent.

    Parameters
    ----------
    table
        Of ``class_distance``; at least four classes.
    model
        The dense model.

    Returns
    -------
    DataFrame
        ``system``, ``layer``, ``spearman``, ``null_mean``, ``null_high`` (95 %), ``p``
        (one-sided), ``excess``, ``classes``.

    Raises
    ------
    MoeeError
        Fewer than four classes, a model without a linear classifier, no permutations.
    """
    draw_numbers(seed, permutations=permutations)
    rows = []
    for (system, layer), part in table.groupby(["system", "layer"], sort=False):
        square = part.pivot(index="class_index_a", columns="class_index_b", values="js")
        if len(square) < 4:
            raise MoeeError("at least four classes", str(len(square)), "show more classes")
        own = _classifier_distance(model, square.index.to_numpy())
        found = _mantel(square.to_numpy(), own, permutations, np.random.default_rng(seed))
        rows.append({"system": system, "layer": layer, **found, "classes": len(square)})
    return pd.DataFrame(rows)


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
