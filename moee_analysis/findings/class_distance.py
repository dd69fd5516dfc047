"""Which classes are routed alike, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import above, bits, course, largest, of_each, smallest


def class_distance(table: pd.DataFrame) -> str:
    """Say which two classes are routed most differently, and which most alike."""
    pairs = table[table["class_index_a"] < table["class_index_b"]]
    far, near = largest(pairs, "js"), smallest(pairs, "js")
    if far is None:
        return "There are no two classes to compare."
    several = table["system"].nunique() > 1
    return (
        f"Routed most differently: {_pair(far, several=several)}. Most alike: "
        f"{_pair(near, several=several)}; two halves of one class differ by {bits(near['floor'])}."
    )


def family_separation(table: pd.DataFrame) -> str:
    """Say how surely two classes of a family are nearer than two of different families."""
    told = of_each(
        table,
        lambda part: (
            f"{course(part, 'auc')}, beyond permuted families in "
            f"{above(part, 'auc', 'null_high')} layers"
        ),
    )
    return (
        "Probability that two classes of a family are routed more alike than two of different "
        f"families (chance 0.50): {told}."
    )


def class_relatedness(table: pd.DataFrame) -> str:
    """Say how far routing goes with what the classifier takes for similar."""
    told = of_each(
        table,
        lambda part: (
            f"{course(part, 'spearman')}, beyond permuted classes in "
            f"{above(part, 'spearman', 'null_high')} layers"
        ),
    )
    return f"Rank correlation of routing distance and classifier distance: {told}."


def _pair(row: pd.Series, *, several: bool) -> str:
    system = f" of {row['system']}" if several else ""
    return (
        f"{row['class_a']} and {row['class_b']} in layer {row['layer']}{system} "
        f"({bits(row['js'])} bits)"
    )
