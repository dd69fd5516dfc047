"""Which system keeps most at which saving, and what its router is good for, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import largest, percent, sentence, smallest


def comparison(table: pd.DataFrame) -> str:
    """Say which systems that save MACs keep most and least of the dense top-1 at each budget."""
    saving = table[table["reduces_macs"].astype("boolean").fillna(value=False)]
    told = [f"{_asked(point)} {_order(rows)}" for point, rows in saving.groupby("macs_asked")]
    return f"Of the dense top-1, {'; '.join(told)}." if told else "No system saves MACs."


def routing_controls(table: pd.DataFrame) -> str:
    """Say how many systems keep more with their own router than at random, and which gains most."""
    routed = table.dropna(subset=["mean", "random_routing"])
    told = [f"{_asked(point)} {_gain(rows)}" for point, rows in routed.groupby("macs_asked")]
    return sentence("; ".join(told) or "no system has a router to compare")


def _asked(point: float) -> str:
    return f"at −{100 * point:g} % MACs"


def _order(rows: pd.DataFrame) -> str:
    """The first system, the first of another family, and the last."""
    best, worst = largest(rows, "mean"), smallest(rows, "mean")
    if best is None:
        return "nothing is known"
    told = f"{best['system']} keeps most ({percent(best['mean'])})"
    rival = largest(rows[rows["family"] != best["family"]], "mean")
    told += "" if rival is None else f", of the other families {_named(rival)}"
    return told if worst["system"] == best["system"] else f"{told}, and {_named(worst)} least"


def _gain(rows: pd.DataFrame) -> str:
    means = rows.groupby("system", sort=False)[["mean", "random_routing", "static_pruning"]].mean()
    means = means.assign(gain=means["mean"] - means["random_routing"]).reset_index()
    top, ahead = largest(means, "gain"), int((means["gain"] > 0).sum())
    return (
        f"{ahead} of {len(means)} systems keep more with their own router than with random "
        f"routing, {top['system']} gains most ({percent(top['mean'])} against "
        f"{percent(top['random_routing'])}); the best static pruning keeps "
        f"{percent(means['static_pruning'].max())}"
    )


def _named(row: pd.Series) -> str:
    return f"{row['system']} ({percent(row['mean'])})"
