"""The steps of an extraction in words: clusters found, clusters invented, experts on patches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from moee_analysis.findings.wording import listed, percent, sentence


def embedding(table: pd.DataFrame) -> str:
    """Say in how many clusters the tokens of each layer fall, and how many in none."""
    told = []
    for layer, tokens in table.groupby("layer"):
        clusters = tokens.loc[tokens["cluster"] >= 0, "cluster"].nunique()
        noise = (tokens["cluster"] < 0).mean()
        many = "1 cluster" if clusters == 1 else f"{clusters} clusters"
        told.append(f"{many} in layer {layer} ({percent(noise)} in none)")
    return f"The tokens fall into {listed(told)}." if told else "No layer is shown."


def surrogate(table: pd.DataFrame) -> str:
    """Say how many clusters are found in the activations, and in a surrogate without any."""
    told = []
    for layer, rows in table.groupby("layer"):
        real, made = (rows.set_index("data").loc[name] for name in ("activations", "surrogate"))
        told.append(
            f"layer {layer}: {real['clusters']:.0f} clusters and {percent(real['noise_share'])} "
            f"noise in the activations, {made['clusters']:.0f} and {percent(made['noise_share'])} "
            "in a surrogate that has no clusters by construction"
        )
    return sentence("; ".join(told) or "no layer is shown")


def patches(pictures: Sequence[np.ndarray], experts: Mapping[int, np.ndarray]) -> str:
    """Say how many experts take the patches, and how often neighbouring patches share one.

    By chance they would as often as two patches do that are drawn at random.

    Parameters
    ----------
    pictures
        As for the figure; only their number counts.
    experts
        Expert of each patch by layer, int (pictures, rows, columns).
    """
    told = [f"layer {layer}: {_regions(experts[layer])}" for layer in sorted(experts)]
    found = "; ".join(told) or "there is no layer of patches to show"
    many = "1 picture" if len(pictures) == 1 else f"{len(pictures)} pictures"
    return f"{many}. {sentence(found)}"


def _regions(choice: np.ndarray) -> str:
    taken = np.unique(choice, return_counts=True)[1]
    across = (choice[:, :, 1:] == choice[:, :, :-1]).ravel()
    along = (choice[:, 1:] == choice[:, :-1]).ravel()
    chance = float(((taken / taken.sum()) ** 2).sum())
    beside = np.concatenate([across, along])
    shared = percent(float(beside.mean()) if len(beside) else float("nan"))
    many = "1 expert takes" if len(taken) == 1 else f"{len(taken)} experts take"
    return (
        f"{many} the patches, and {shared} of neighbouring patches share one "
        f"(by chance {percent(chance)})"
    )
