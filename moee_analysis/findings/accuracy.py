"""What systems keep of the dense model's accuracy, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import listed, percent


def accuracy(table: pd.DataFrame) -> str:
    """Say what each system of a table of ``measure.accuracy`` keeps, or its top-1 alone."""
    if table["retention"].isna().all():
        told = [f"{row.system} {percent(row.top1)}" for row in table.itertuples()]
        return f"Top-1 is: {listed(told)}."
    others = table[table["kl"] != 0]  # the dense model is at no distance from itself
    dense = f"of the dense top-1 ({percent(table['reference_top1'].max())})"
    if others.empty:
        return f"All {dense} is kept."
    first, *rest = zip(others["system"], others["retention"].map(percent), strict=True)
    told = [f"{first[0]} keeps {first[1]} {dense}", *(f"{name} {kept}" for name, kept in rest)]
    return f"{', '.join(told)}."
