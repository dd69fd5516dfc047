"""How differently classes are routed, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import above, bits, course, largest, of_each, percent, smallest


def class_routing(table: pd.DataFrame) -> str:
    """Say which class leans most to an expert, in the layer where that is most and least."""
    leaning = table.assign(ahead=table["share"] - table["share_all"])
    by_layer = leaning.groupby(["system", "layer"], sort=False)["ahead"].max().reset_index()
    most, least = largest(by_layer, "ahead"), smallest(by_layer, "ahead")
    if most is None:
        return "No share is known."
    told = f"A class leans most to one expert in {_leaning(leaning, most)}"
    if len(by_layer) > 1:
        told += f"; least in {_leaning(leaning, least)}"
    return f"{told}."


def specificity(table: pd.DataFrame) -> str:
    """Say how far classes are from all classes, and in how many layers beyond permuted labels."""
    mean = table[table["class_index"] < 0]
    told = of_each(
        mean,
        lambda part: (
            f"{course(part, 'corrected', bits)}, beyond permuted labels in "
            f"{above(part, 'js', 'null_high')} layers"
        ),
    )
    return f"Mean divergence of a class from all classes, in bits, bias removed: {told}."


def class_information(table: pd.DataFrame) -> str:
    """Say how much of the experts' entropy the class explains, and in how many layers surely."""
    told = of_each(
        table,
        lambda part: (
            f"{course(part, 'corrected', percent)}, more than permuted labels in "
            f"{int((part['p'] < 0.05).sum())} of {len(part)} layers"
        ),
    )
    return f"Of the experts' entropy the class of the image explains: {told}."


def _leaning(table: pd.DataFrame, where: pd.Series) -> str:
    """The class and expert of the largest lead in the system and layer of ``where``."""
    here = (table["system"] == where["system"]) & (table["layer"] == where["layer"])
    row = largest(table[here], "ahead")
    system = f" of {where['system']}" if table["system"].nunique() > 1 else ""
    return (
        f"layer {where['layer']}{system}: {percent(row['share'])} of the tokens of "
        f"{row['class_name']} go to expert {row['expert']} (all classes: "
        f"{percent(row['share_all'])})"
    )
