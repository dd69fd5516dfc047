"""What is lost once an expert is knocked out, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import (
    above,
    course,
    listed,
    number,
    of_each,
    percent,
    points,
    smallest,
)

_WHAT = {"removed": "one expert removed", "alone": "one expert alone"}


def knock_out(table: pd.DataFrame) -> str:
    """Say what removing one expert, and leaving one alone, does to top-1, beside random tokens."""
    rows = table[table["kind"] == "all"]
    intact, dense = percent(rows["top1_intact"].iloc[0]), percent(rows["top1_dense"].iloc[0])
    told = listed(
        [_mean_changes(rows[rows["what"] == what], words) for what, words in _WHAT.items()]
    )
    worst = smallest(rows[(rows["what"] == "removed") & (rows["system"] == "expert")], "change")
    most = (
        f" Most is lost without expert {worst['expert']} of layer {worst['layer']}: "
        f"{points(worst['change'])} percentage points."
        if worst is not None
        else ""
    )
    return f"Top-1 of {intact} intact (dense: {dense}) changes on average by {told}.{most}"


def class_knock_out(table: pd.DataFrame) -> str:
    """Say which class loses most without an expert, in every layer."""
    rows = table[(table["kind"] == "class") & (table["what"] == "removed")]
    rows = rows[rows["system"] == "expert"]
    told = [_worst(layer, part) for layer, part in rows.groupby("layer")]
    return f"The log-probability of a class falls most, in nats: {'; '.join(told)}."


def use_and_need(table: pd.DataFrame) -> str:
    """Say how far use and need go together, and in how many layers beyond permuted classes."""
    told = of_each(
        table,
        lambda rows: (
            f"{course(rows, 'spearman')}, beyond permuted classes in "
            f"{above(rows, 'spearman', 'null_high')} layers"
        ),
    )
    return f"Rank correlation of use and need over classes and experts: {told}."


def _mean_changes(rows: pd.DataFrame, words: str) -> str:
    expert, random = (
        points(rows.loc[rows["system"] == system, "change"].mean())
        for system in ("expert", "random tokens")
    )
    return f"{expert} percentage points with {words} ({random} with as many random tokens)"


def _worst(layer: int, rows: pd.DataFrame) -> str:
    row = smallest(rows, "logp_change")
    if row is None:
        return f"unknown in layer {layer}"
    change = number(row["logp_change"])
    return f"{change} for {row['group']} without expert {row['expert']} of layer {layer}"
