"""What the pieces of a recipe are worth, and its settings, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import bits, largest, listed, smallest


def ablation(table: pd.DataFrame) -> str:
    """Say how far the recipes are from the dense model, and which piece counts most in each."""
    own = table.dropna(subset=["direction", "kl"])
    own = own[own["recipe"].fillna("") != ""]  # without the dense model
    whole = own[own["direction"] == "as it is"]
    told = listed(f"{bits(row.kl)} nats with {row.recipe}" for row in whole.itertuples())
    extremes = [
        _extreme("Most is lost without", largest(own[own["direction"] == "off in turn"], "kl")),
        _extreme("Most is gained alone by", smallest(own[own["direction"] == "on alone"], "kl")),
    ]
    controls = own[own["direction"] == "control"]
    beside = [f"{row.value} of {row.recipe} {bits(row.kl)}" for row in controls.itertuples()]
    if beside:
        extremes.append(f" Controls: {listed(beside)} nats.")
    return f"KL divergence from the dense model: {told}.{''.join(extremes)}"


def sweeps(table: pd.DataFrame) -> str:
    """Say at which setting of each sweep the divergence from the dense model is lowest."""
    told = []
    for name, rows in table[table["setting"].notna()].groupby("sweep", sort=False):
        best = smallest(rows[rows["system"] == rows["system"].iloc[0]], "kl")
        if best is not None:
            setting = " ".join(str(best["setting"]).split())
            told.append(f"{name}: {setting} ({bits(best['kl'])})")
    return f"Lowest KL divergence, in nats: {'; '.join(told) or 'unknown'}."


def _extreme(words: str, row: pd.Series | None) -> str:
    return "" if row is None else f" {words} {row['piece']} ({bits(row['kl'])} nats)."
