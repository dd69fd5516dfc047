"""What fine-tuning gives back, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import bits, largest, listed, of_each, percent, smallest


def fine_tuning(table: pd.DataFrame) -> str:
    """Say what each system keeps before and after, at the largest saving of MACs."""
    saved = table.groupby("budget")["macs_reduction"].mean().reset_index()
    most = largest(saved, "macs_reduction")
    if most is None:
        return "No saving is known."
    told = of_each(table[table["budget"] == most["budget"]], _stages)
    return f"Kept of the dense top-1 at {percent(most['macs_reduction'])} fewer MACs: {told}."


def history(table: pd.DataFrame) -> str:
    """Say how far the divergence falls, after which epoch it is lowest, and what then agrees."""
    named = table if "system" in table else table.assign(system="On images held out")
    told = of_each(named, _falls)
    return f"{told}."


def _stages(rows: pd.DataFrame) -> str:
    first = rows.drop_duplicates("stage")
    return listed(
        f"{percent(mean)} {stage}"
        for stage, mean in zip(first["stage"], first["mean"], strict=True)
    )


def _falls(rows: pd.DataFrame) -> str:
    began, kept = rows.iloc[0], smallest(rows, "kl")
    if kept is None:
        return "the divergence from the dense model is unknown"
    return (
        f"the divergence from the dense model goes from {bits(began['kl'])} to "
        f"{bits(kept['kl'])} nats, its lowest, after epoch {kept['epoch']:.0f}, and the agreement "
        f"with its predictions from {percent(began['agreement'])} to {percent(kept['agreement'])}"
    )
