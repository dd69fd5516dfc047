"""What a network costs beside the dense one, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import change, largest, smallest, whole


def macs(table: pd.DataFrame) -> str:
    """Say what the whole network saves, and in which MLPs most and least is saved."""
    total = table[table["component"] == "total"].iloc[0]
    now, dense = (whole(total[name] / 1e6) for name in ("macs", "macs_dense"))
    first = (
        f"An image takes {now} instead of the dense model's {dense} million MACs "
        f"({change(total['macs'], total['macs_dense'])}); stored parameters change by "
        f"{change(total['params'], total['params_dense'])}."
    )
    mlps = table[table["layer"] >= 0]
    mlps = mlps.assign(left=mlps["macs"] / mlps["macs_dense"])
    most, least = smallest(mlps, "left"), largest(mlps, "left")
    if most is None or most["layer"] == least["layer"]:
        return first
    told = [f"layer {row['layer']} ({change(row['left'], 1)})" for row in (most, least)]
    return f"{first} Of the MLPs' MACs most is saved in {told[0]}, least in {told[1]}."
