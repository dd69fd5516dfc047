"""Which parts of a scene are no longer seen once an expert is knocked out, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import of_each, percent, points, smallest


def parts_unseen(table: pd.DataFrame) -> str:
    """Say how many changes of recall are clear, and which part is lost most."""
    told = of_each(table, _clear)
    worst = smallest(table[table["system"] == "expert"], "change")
    if worst is None:
        return f"Recall of parts falls clearly: {told}."
    return (
        f"Recall of a part falls clearly: {told}. Most in layer {worst['layer']} without expert "
        f"{worst['expert']}: {worst['part']} from {percent(worst['recall_intact'])} by "
        f"{points(worst['change'])} percentage points."
    )


def _clear(rows: pd.DataFrame) -> str:
    return f"in {int((rows['high'] < 0).sum())} of {len(rows)} pairs of knock-out and part"
