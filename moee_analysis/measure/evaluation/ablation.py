"""What each piece of a recipe is worth, and what each quantity in it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from torch import nn

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.recipes import recipe_named
from moee_analysis.measure.evaluation.variants import Variant, made_of, variants

METHODS = {"hdbscan": "HDBSCAN", "kmeans": "k-means"}


def ablation(
    dense: nn.Module,
    calibration: ImageSet,
    images: ImageSet,
    config: ExtractConfig,
    *,
    store: str | Path,
    other: str = "paper",
    repeats: int = 2,
    **bootstrap: int,
) -> pd.DataFrame:
    """Each piece of a recipe off in turn, and each alone added to another recipe.

    Parameters
    ----------
    config
        The recipe to take apart, with its budget in MACs, sizes and seed. Where it sets pieces
        itself, these are the recipe's.
    other
        The recipe that says what a piece is when it is off, and that each is added to. Pieces
        that both have in common are left out.
    repeats
        How often the whole recipe is extracted again with another seed, and so from other
        calibration images, tokens and clusters: what differs by chance.
    bootstrap
        ``seed`` and ``resamples``, as for :func:`variants`.

    Returns
    -------
    DataFrame
        The columns of :func:`variants`, changes being those to the recipe as it is, and:
        ``recipe``, that the variant starts from; ``piece``, the one that differs, and its
        ``value``; ``direction``: ``as it is``, ``another seed``, ``off in turn``, ``on alone`` or
        ``control``. The controls of both recipes are static pruning, random routing and random
        centres. The first row is the dense model.

    Raises
    ------
    MoeeError
        The same recipe twice, or a configuration that the other recipe cannot have.
    """
    if config.recipe == other:
        raise MoeeError("two recipes", f"'{other}' twice", "compare with another one")
    whole = _tried(config, other)
    bases = {row["recipe"]: each for row, each in whole if row["direction"] == "as it is"}
    made = made_of(dense, calibration, bases.values(), Path(store))
    for recipe, base in bases.items():
        if made[base].run is not None:
            control = randomly_routed(made[base].run, seed=bootstrap.get("seed", 0))
            whole.append((_row(recipe, "router", "random routing", "control"), control))
    for seed in range(config.seed + 1, config.seed + 1 + repeats):
        row = _row(config.recipe, "seed", str(seed), "another seed")
        whole.append((row, replace(config, seed=seed)))
    beside = {_name(row): row["recipe"] for row, _ in whole}
    whole.insert(0, (_row("", "", "dense", "as it is"), dense))
    tried = {_name(row): each for row, each in whole}
    table = variants(dense, calibration, images, tried, store=store, beside=beside, **bootstrap)
    for place, column in enumerate(_row("", "", "", ""), start=1):
        table.insert(place, column, [row[column] for row, _ in whole])
    return table


def _tried(config: ExtractConfig, other: str) -> list[tuple[dict[str, str], ExtractConfig]]:
    """Rows of the table, and the configuration of each."""
    theirs = recipe_named(other)
    own = {piece: getattr(config.resolved(), piece) for piece in theirs}
    base = replace(config, recipe=other, **dict.fromkeys(own))
    theirs = {piece: value for piece, value in theirs.items() if value != own[piece]}
    found = []
    mine = {piece: own[piece] for piece in theirs}
    for start, pieces, direction in ((config, theirs, "off in turn"), (base, mine, "on alone")):
        found.append((_row(start.recipe, "", "", "as it is"), start))
        for piece, value in pieces.items():
            row = _row(start.recipe, piece, _words(value), direction)
            found.append((row, replace(start, **{piece: value})))
        row = _row(start.recipe, "experts", "static pruning", "control")
        found.append((row, replace(start, experts="one")))
        centres = replace(
            start.resolved().clustering, method="random", count=own["clustering"].count
        )
        row = _row(start.recipe, "clustering", "random centres", "control")
        found.append((row, replace(start, clustering=centres)))
    return found


def _row(recipe: str, piece: str, value: str, direction: str) -> dict[str, str]:
    return {"recipe": recipe, "piece": piece, "value": value, "direction": direction}


def _name(row: dict[str, str]) -> str:
    if row["direction"] == "control":
        return f"{row['recipe']}, {row['value']}"
    change = f", {row['piece']}: {row['value']}" if row["piece"] else row["value"]
    return row["recipe"] + change


def _words(value: str | ClusterConfig) -> str:
    if not isinstance(value, ClusterConfig):
        return value
    return f"{METHODS.get(value.method, value.method)} of {value.space}"


def sweeps(
    dense: nn.Module,
    calibration: ImageSet,
    images: ImageSet,
    tried: Mapping[str, Mapping[str, Mapping[Any, Variant]]],
    *,
    store: str | Path,
    beside: Variant | None = None,
    **bootstrap: int,
) -> pd.DataFrame:
    """Vary one quantity at a time, in one or several systems.

    Parameters
    ----------
    tried
        By system and by name of the sweep: a configuration, or a model made already, by its
        setting. The setting None is for what does not depend on any.
    beside
        One of the variants, that all are compared with.
    bootstrap
        ``seed`` and ``resamples``, as for :func:`variants`.

    Returns
    -------
    DataFrame
        The columns of :func:`variants`, and: ``system``, ``sweep``, ``setting``; ``recipe``, empty
        for a model made already.

    Raises
    ------
    MoeeError
        As for :func:`variants`.
    """
    whole = {
        (system, sweep, setting): each
        for system, by_sweep in tried.items()
        for sweep, by_setting in by_sweep.items()
        for setting, each in by_setting.items()
    }
    found = [name for name, each in whole.items() if each == beside]
    if beside is not None and not found:
        raise MoeeError("a variant that is tried", f"{beside}", "add it to a sweep")
    compared = dict.fromkeys(whole, found[0]) if found else None
    table = variants(dense, calibration, images, whole, store=store, beside=compared, **bootstrap)
    recipes = ["" if isinstance(each, nn.Module) else each.recipe for each in whole.values()]
    first = next(iter(tried))
    table["variant"] = [_name_of_setting(*name, first=first) for name in whole]
    for place, column in enumerate(("system", "sweep", "setting"), start=1):
        table.insert(place, column, pd.Series([name[place - 1] for name in whole], dtype=object))
    table.insert(4, "recipe", recipes)
    return table


def _name_of_setting(system: str, sweep: str, setting: Any, *, first: str) -> str:
    """``sweep: setting``, with the name of the system unless it is the first."""
    words = [] if setting is None else [" ".join(str(setting).split())]
    return f"{sweep}: " + ", ".join(words if system == first else [*words, system])
