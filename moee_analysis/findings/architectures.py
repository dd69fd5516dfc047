"""Several architectures side by side, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import listed, of_each, percent, span, whole

_QUANTITIES = {
    "experts": ("Experts per layer", whole),
    "active": ("Hidden neurons a token uses", percent),
    "class": ("Of the experts' entropy the class explains", percent),
}


def architectures(table: pd.DataFrame) -> str:
    """Say between what experts, neurons in use and class information lie in each model."""
    told = []
    for quantity, (name, form) in _QUANTITIES.items():
        rows = table[table["quantity"] == quantity]
        if len(rows):
            ranges = (f"{model} {span(p['value'], form)}" for model, p in _by_model(rows))
            told.append(f"{name}: {listed(ranges)}.")
    return " ".join(told) or "No quantity is known."


def architecture_variants(table: pd.DataFrame) -> str:
    """Say what each model keeps of its dense top-1 with every variant."""
    tried = table[table["variant"] != "dense"]
    told = of_each(
        tried,
        lambda rows: listed(f"{percent(r.retention)} ({r.variant})" for r in rows.itertuples()),
        by="model",
    )
    return f"Kept of the dense top-1: {told}."


def _by_model(rows: pd.DataFrame) -> pd.api.typing.DataFrameGroupBy:
    return rows.groupby("model", sort=False)
