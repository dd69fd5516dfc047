"""What groups of experts on slots add to the tokens, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import course, of_each


def contributions(table: pd.DataFrame) -> str:
    """Say how long each group's output is over the layers, the mean of the seeds."""
    by = ["group", "layer"]
    mean = table.groupby(by, sort=False)["contribution"].mean().reset_index()
    told = of_each(mean, lambda rows: course(rows, "contribution"), by="group")
    return f"Mean length of what is added to a token, over the layers: {told}."
