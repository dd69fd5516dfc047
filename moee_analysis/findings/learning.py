"""How models learn that start in different ways, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import largest, percent, points, smallest


def learning_curves(table: pd.DataFrame) -> str:
    """Say which start ends highest and which lowest, after how many images."""
    ends = table[table["images"] == table["images"].max()].drop_duplicates("start")
    told = _ends(ends, "mean")
    return f"After {table['images'].max():.0f} training images top-1 is {told}."


def learned(table: pd.DataFrame) -> str:
    """Say which start ends highest and which lowest, and which reaches the level first."""
    first = smallest(table, "images")
    level = percent(table["level"].iloc[0])
    soon = f" No start reaches {level}."
    if first is not None:
        seen = f"after {first['images']:.0f} images"
        soon = f" {level} is reached first by {first['start']}, {seen}."
    return f"At the end top-1 is {_ends(table, 'top1')}.{soon}"


def which_beats_which(table: pd.DataFrame) -> str:
    """Say how many pairs differ beyond chance, and which lead is the largest of these."""
    pairs = table[table["start_a"] != table["start_b"]]
    sure = pairs[pairs["beats"].astype(bool)]
    first = f"{len(sure)} of {len(pairs) // 2} pairs of starts differ beyond chance"
    top = largest(sure, "difference")
    if top is None:
        return f"{first}."
    return (
        f"{first}; the largest lead is that of {top['start_a']} over {top['start_b']}, "
        f"{points(top['difference'])} points of top-1 ({points(top['low'])} to "
        f"{points(top['high'])})."
    )


def _ends(table: pd.DataFrame, value: str) -> str:
    top, bottom = largest(table, value), smallest(table, value)
    if top is None:
        return "unknown"
    told = [
        f"{row['start']}: {percent(row[value])} ({percent(row['low'])} to {percent(row['high'])})"
        for row in (top, bottom)
    ]
    return f"highest for {told[0]}, lowest for {told[1]}" if told[0] != told[1] else told[0]
