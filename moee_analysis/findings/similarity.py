"""How alike the mean inputs of experts are, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import course, of_each, percent, span


def similarity(table: pd.DataFrame) -> str:
    """Say between what the cosines of two experts lie in each layer, raw and centred."""
    pairs = table[table["expert_a"] < table["expert_b"]]
    if pairs.empty:
        return "No layer has two experts to compare."
    several = pairs["system"].nunique() > 1
    told = [
        f"{f'{system}, ' if several else ''}layer {layer} {span(part['cosine'])} "
        f"(centred {span(part['cosine_centred'])})"
        for (system, layer), part in pairs.groupby(["system", "layer"], sort=False)
    ]
    return f"Cosines of two experts' mean inputs: {'; '.join(told)}."


def similarity_summary(table: pd.DataFrame) -> str:
    """Say how the mean cosine runs over the layers, and how many pairs are nearly orthogonal."""
    told = of_each(
        table,
        lambda part: (
            f"{course(part, 'mean')}, centred {span(part['centred_mean'])}; nearly orthogonal "
            f"are {span(part['near_orthogonal'], percent)} of the pairs, the common mean holds "
            f"{span(part['common_mean'], percent)}"
        ),
    )
    return f"Mean cosine of two experts' mean inputs over the layers: {told}."
