"""What routers cost beside the best one possible, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import of_each, percent, span


def router_regret(table: pd.DataFrame) -> str:
    """Say between what the error of each router lies over the layers, and its regret."""
    told = of_each(
        table,
        lambda rows: (
            f"{span(rows['error'], percent)} (regret {span(rows['regret'], percent)}, "
            f"best expert for {span(rows['best'], percent)} of the tokens)"
        ),
        by="router",
    )
    return f"Squared error of the output over its variance, by router, over the layers: {told}."
