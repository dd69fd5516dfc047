"""How evenly the experts are used, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import course, of_each

_NAMES = {
    "gini": "Gini coefficient (0 is even)",
    "entropy": "Normalised entropy (1 is even)",
    "max_over_mean": "Largest over mean share (1 is even)",
    "cv2": "Squared coefficient of variation (0 is even)",
    "dead": "Experts never used",
}


def routing(table: pd.DataFrame) -> str:
    """Say how many times an even share the most used expert of each layer takes."""
    first = table[table["rank"] == 0]
    first = first.assign(times=first["share"] * first["n_experts"])
    told = of_each(first, lambda part: course(part, "times"))
    return f"The most used expert of a layer takes so many times an even share: {told}."


def balance(table: pd.DataFrame) -> str:
    """Say how the Gini coefficient runs over the layers; or another metric, where it is not."""
    known = set(table["metric"])
    metric = next((name for name in _NAMES if name in known), table["metric"].iloc[0])
    told = of_each(table[table["metric"] == metric], lambda part: course(part, "value"))
    return f"{_NAMES.get(metric, metric)} over the layers: {told}."
