"""What experts look at, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moee_analysis.findings.wording import largest, listed, number, percent, smallest


def top_patches(table: pd.DataFrame, pictures: object = None) -> str:
    """Say how many experts are shown, how much the busiest takes, and whose patches are most alike.

    ``pictures`` are as for the figure.
    """
    experts = table.drop_duplicates(["layer", "expert"])
    if experts.empty:
        return "No patch goes to the experts that were asked for."
    told = _expert(largest(experts, "share"))
    if len(experts) > 1:
        told = f"of {len(experts)} experts {told}, {_expert(smallest(experts, 'share'))}"
    last = table.groupby(["layer", "expert"], sort=False)["cosine"].min().reset_index()
    alike = largest(last, "cosine")
    return (
        f"{told[:1].upper()}{told[1:]}. The patches shown are most alike for expert "
        f"{alike['expert']:.0f} of layer {alike['layer']:.0f}: all have a cosine of "
        f"{number(alike['cosine'])} or more with its mean input."
    )


def image_layers(
    pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray], image: int | None = None
) -> str:
    """Say how many experts the patches of one image meet, in the layers of fewest and most.

    Parameters
    ----------
    pictures, experts, image
        As for the figure; without an ``image`` the mean over all is told.
    """
    if not experts:
        return "There is no layer of patches to show."
    met = {
        layer: np.mean([len(np.unique(one)) for one in choice]) if image is None
        else len(np.unique(choice[image]))
        for layer, choice in sorted(experts.items())
    }  # fmt: skip
    few, many = min(met, key=met.get), max(met, key=met.get)
    whose = "this image" if image is not None else f"one of {len(pictures)} images, on average,"
    each = listed(
        f"{number(met[layer], 1).removesuffix('.0')} experts in layer {layer}"
        for layer in dict.fromkeys((few, many))
    )
    return f"The patches of {whose} meet {each}."


def _expert(row: pd.Series) -> str:
    return (
        f"expert {row['expert']:.0f} of layer {row['layer']:.0f} takes {percent(row['share'])} of "
        f"the patches, in {row['images']:.0f} images"
    )
