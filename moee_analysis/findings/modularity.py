"""Whether experts stand for parts of the scene, in words."""

from __future__ import annotations

import pandas as pd

from moee_analysis.findings.wording import above, course, largest, of_each, percent


def modularity(table: pd.DataFrame) -> str:
    """Say how much experts and parts know of each other, and in how many layers beyond chance."""
    told = of_each(
        table,
        lambda part: (
            f"{course(part, 'ami')}, beyond masks exchanged within a class in "
            f"{above(part, 'ami', 'class_null_high')} layers"
        ),
    )
    return f"Adjusted mutual information of expert and part: {told}."


def part_profile(table: pd.DataFrame) -> str:
    """Say which expert is purest: of which most patches show one part."""
    purest = largest(table, "share")
    if purest is None:
        return "No expert takes a patch."
    several = table["system"].nunique() > 1
    system = f" of {purest['system']}" if several else ""
    return (
        f"Purest is expert {purest['expert']} of layer {purest['layer']}{system}: "
        f"{percent(purest['share'])} of its patches show {purest['part']}, of all patches "
        f"{percent(purest['share_all'])}. It takes {percent(purest['size'])} of the patches."
    )
