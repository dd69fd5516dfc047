"""Whether the experts that a class uses most are those that it needs most."""

import numpy as np
import pandas as pd
from scipy.stats import rankdata

from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import against_chance
from moee_analysis.utils.checks import draw_numbers

BEYOND = "beyond random tokens"
"""Name of what an expert's removal does more than that of random tokens."""


def uses_and_needs(table: pd.DataFrame) -> pd.DataFrame:
    """How much more than all classes each class uses an expert, and loses without it.

    Of a table of ``knock_out``. Columns: ``layer``, ``system`` (expert | random tokens | beyond
    random tokens: the one less the other), ``class_name``, ``expert``, ``use`` (share of the
    class's tokens that the expert has, less the mean over classes), ``need`` (how much the
    log-probability of the class falls without them, in nats, less the mean over classes).
    Raises MoeeError: fewer than four classes.
    """
    rows = table[(table["kind"] == "class") & (table["what"] == "removed")]
    if rows["group"].nunique() < 4:
        raise MoeeError(
            "at least four classes", str(rows["group"].nunique()), "knock out with more images"
        )
    rows = rows.rename(columns={"group": "class_name", "knocked_out": "use"})
    rows = rows.assign(need=-rows["logp_change"])
    keys, values = ["layer", "class_name", "expert"], ["use", "need"]
    wide = rows.pivot(index=keys, columns="system", values=values)
    need = wide["need", "expert"] - wide["need", "random tokens"]
    beyond = pd.DataFrame({"use": wide["use", "expert"], "need": need}).reset_index()
    columns = ["layer", "system", "class_name", "expert", *values]
    found = pd.concat([rows[columns], beyond.assign(system=BEYOND)], ignore_index=True)
    found[values] -= found.groupby(["layer", "system", "expert"])[values].transform("mean")
    return found


def use_and_need(table: pd.DataFrame, *, permutations: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of use and need over pairs of class and expert, layer by layer.

    A class that sends an expert more of its tokens loses more of them when it goes, whatever the
    expert: the same is asked of random tokens, and of what the expert's removal does beyond them.
    Chance: what classes need is permuted over whole classes, for the experts of a class depend on
    each other. ``table`` is of ``knock_out``.

    Columns: ``layer``, ``system``, ``experts``, ``classes``, ``spearman``, ``null_mean``,
    ``null_high`` (95 %), ``p`` (one-sided), ``excess``; ``top_match`` (share of classes whose most
    over-used expert is the one whose removal costs them most, beside other classes),
    ``top_match_null_mean``, ``top_match_null_high``, ``top_match_p``, ``top_match_excess``, and
    ``top_match_even`` (1 / experts: a blind guess).
    Raises MoeeError: fewer than four classes, or no permutations.
    """
    draw_numbers(seed, permutations=permutations)
    groups = uses_and_needs(table).groupby(["layer", "system"], sort=False)
    rows = [
        {"layer": layer, "system": system} | _row(part, permutations, np.random.default_rng(seed))
        for (layer, system), part in groups
    ]
    result = pd.DataFrame(rows)
    result.attrs["caption"] = (
        f"Pairs of {rows[0]['classes']} classes and the experts of a layer. "
        f"Null: {permutations} permutations of whole classes, seed {seed}."
    )
    return result


def _row(part: pd.DataFrame, permutations: int, rng: np.random.Generator) -> dict[str, float]:
    wide = part.pivot(index="class_name", columns="expert", values=["use", "need"])
    use, need = wide["use"].to_numpy(), wide["need"].to_numpy()
    classes, experts = use.shape
    orders = [np.arange(classes), *(rng.permutation(classes) for _ in range(permutations))]
    one, other = _unit_ranks(use), _unit_ranks(need)
    correlations = np.array([(one * other[order]).sum() for order in orders])
    top = use.argmax(axis=1)
    matches = np.array([(top == need[order].argmax(axis=1)).mean() for order in orders])
    row: dict[str, float] = {"experts": experts, "classes": classes}
    for name, prefix, values in (
        ("spearman", "", correlations),
        ("top_match", "top_match_", matches),
    ):
        row[name] = float(values[0])  # the first order is that of the classes, the others chance
        chance = against_chance(values[0], values[1:])
        row |= {prefix + each: float(value) for each, value in chance.items()}
    return row | {"top_match_even": 1 / experts}


def _unit_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks of ``values`` less their mean, of length 1; all 0 where they are constant."""
    ranks = rankdata(values).reshape(values.shape)
    ranks -= ranks.mean()
    length = np.linalg.norm(ranks)
    return ranks / length if length else ranks
