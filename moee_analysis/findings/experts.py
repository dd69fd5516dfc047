"""What the experts are made of, in words: how many, how large, what they share."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import course, number, of_each, percent, span, whole


def layers(table: pd.DataFrame) -> str:
    """Say how many layers have experts, with how much noise and how many neurons in use."""
    made = table[table["converted"]].rename(columns={"index": "layer"})
    first = f"{len(made)} of {len(table)} layers have clusters"
    if made.empty:
        return f"{first}: all stay dense."
    noise, active = (course(made, name, percent) for name in ("noise_share", "active_fraction"))
    return (
        f"{first}: {course(made, 'experts', whole)}. Noise among the clustered tokens: {noise}. "
        f"Hidden neurons that a token uses: {active}."
    )


def sizes(table: pd.DataFrame) -> str:
    """Say how many hidden neurons experts keep, tokens use and layers store."""
    return f"Of a layer's hidden neurons: {of_each(table, _sizes)}."


def neurons(table: pd.DataFrame) -> str:
    """Say what share of its neurons the experts of each layer keep, and what none keeps."""
    several = table["system"].nunique() > 1
    told = [
        _kept(part, f"layer {layer}{f' of {system}' if several else ''}")
        for (system, layer), part in table.groupby(["system", "layer"], sort=False)
    ]
    return f"Of the hidden neurons an expert keeps {'; '.join(told)}."


def overlap(table: pd.DataFrame) -> str:
    """Say how many neurons two experts share, beside random subsets of their sizes."""
    pairs = table[table["expert_a"] < table["expert_b"]]
    if pairs.empty:
        return "No layer has two experts to compare."
    ahead = int((pairs["jaccard"] > pairs["expected_jaccard"]).sum())
    return (
        f"The Jaccard index of two experts' neurons is {course(pairs, 'jaccard')}; random subsets "
        f"of their sizes would have {span(pairs['expected_jaccard'], number)}. {ahead} of "
        f"{len(pairs)} pairs share more than that."
    )


def _sizes(experts: pd.DataFrame) -> str:
    return (
        f"experts keep {span(experts['fraction'], percent)}, a token uses on average "
        f"{course(experts, 'active', percent)}, and {span(experts['union'], percent)} are stored"
    )


def _kept(part: pd.DataFrame, where: str) -> str:
    by_expert = part.groupby("expert")["kept"].mean()
    unused = 1 - part.groupby("neuron")["kept"].any().mean()
    return f"{span(by_expert, percent)} in {where} ({percent(unused)} are kept by none)"
