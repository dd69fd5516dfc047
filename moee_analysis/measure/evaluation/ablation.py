"""What each piece of a recipe is worth, and what each quantity in it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from torch import nn

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ClusterConfig, ExtractConfig, recipe_named
from moee_analysis.measure.evaluation.variants import Variant, extract_all, variants

METHODS = {"hdbscan": "HDBSCAN", "kmeans": "k-means"}


class _Change(NamedTuple):
    """How a variant differs from its recipe; the columns of :func:`ablation`."""

    recipe: str
    piece: str = ""
    value: str = ""
    direction: str = "as it is"

    @property
    def name(self) -> str:
        if self.direction == "control":
            return f"{self.recipe}, {self.value}"
        return self.recipe + (f", {self.piece}: {self.value}" if self.piece else self.value)


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

    ``config`` is the recipe to take apart, with its budget in MACs, sizes and seed; where it sets
    pieces itself, these are the recipe's. The ``other`` recipe says what a piece is when it is off,
    and each is added to it; pieces that both have in common are left out. ``repeats`` extractions
    of the whole recipe have other seeds, so other tokens and clusters: what differs by chance.
    ``bootstrap``: ``seed`` and ``resamples``, as for :func:`variants`.

    The columns of :func:`variants`, changes being those to the recipe as it is, and: ``recipe``,
    that the variant starts from; ``piece``, the one that differs, and its ``value``; ``direction``:
    ``as it is``, ``another seed``, ``off in turn``, ``on alone`` or ``control``: static pruning,
    random routing and random centres, of both recipes. The first row is the dense model.
    Raises MoeeError: the same recipe twice, or a configuration that the other recipe cannot have.
    """
    if config.recipe == other:
        raise MoeeError("two recipes", f"'{other}' twice", "compare with another one")
    tried: dict[_Change, Variant] = _changes(config, other)
    recipes = {recipe: tried[_Change(recipe)] for recipe in (config.recipe, other)}
    made = extract_all(dense, calibration, recipes.values(), store)
    for recipe, whole in recipes.items():
        if (run := made[whole].result) is not None:
            random = randomly_routed(run, seed=bootstrap.get("seed", 0))
            tried[_Change(recipe, "router", "random routing", "control")] = random
    for seed in range(config.seed + 1, config.seed + 1 + repeats):
        change = _Change(config.recipe, "seed", str(seed), "another seed")
        tried[change] = replace(config, seed=seed)
    beside = {change.name: change.recipe for change in tried}
    tried = {_Change("", value="dense"): dense} | tried
    named = {change.name: each for change, each in tried.items()}
    table = variants(dense, calibration, images, named, store=store, beside=beside, **bootstrap)
    for place, column in enumerate(_Change._fields):
        table.insert(place + 1, column, [change[place] for change in tried])
    return table


def _changes(config: ExtractConfig, other: str) -> dict[_Change, ExtractConfig]:
    """The configuration of every change of both recipes that needs no run."""
    whole = config.resolved()
    theirs = recipe_named(other)
    own = {piece: getattr(whole, piece) for piece in theirs}
    theirs = {piece: value for piece, value in theirs.items() if value != own[piece]}
    mine = {piece: own[piece] for piece in theirs}
    base = replace(config, recipe=other, **dict.fromkeys(own))
    found = {}
    for start, pieces, direction in ((config, theirs, "off in turn"), (base, mine, "on alone")):
        recipe, clustering = start.recipe, start.resolved().clustering
        found[_Change(recipe)] = start
        for piece, value in pieces.items():
            words = value
            if isinstance(value, ClusterConfig):
                words = f"{METHODS.get(value.method, value.method)} of {value.space}"
            found[_Change(recipe, piece, words, direction)] = replace(start, **{piece: value})
        centres = replace(clustering, method="random", count=own["clustering"].count)
        for piece, words, value in (
            ("experts", "static pruning", "one"), ("clustering", "random centres", centres),
        ):  # fmt: skip
            found[_Change(recipe, piece, words, "control")] = replace(start, **{piece: value})
    return found


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

    ``tried`` are, by system and by name of the sweep, a configuration, or a model made already, by
    its setting; None is for what does not depend on any. All are compared with ``beside``, one of
    them. ``bootstrap``: as for :func:`ablation`.

    The columns of :func:`variants`, and ``system``, ``sweep``, ``setting``, ``recipe`` (if any).
    Raises MoeeError: as for :func:`variants`; a variant ``beside`` that is not tried.
    """
    whole = {
        (system, sweep, setting): each
        for system, by_sweep in tried.items()
        for sweep, by_setting in by_sweep.items()
        for setting, each in by_setting.items()
    }
    found = next((name for name, each in whole.items() if each == beside), None)
    if beside is not None and found is None:
        raise MoeeError("a variant that is tried", f"{beside}", "add it to a sweep")
    compared = dict.fromkeys(whole, found) if found else None
    table = variants(dense, calibration, images, whole, store=store, beside=compared, **bootstrap)
    first, names = next(iter(tried)), []
    for system, sweep, setting in whole:
        words = [] if setting is None else [" ".join(str(setting).split())]
        words += [system] if system != first else []
        names.append(f"{sweep}: " + ", ".join(words))
    table["variant"] = names
    for place, column in enumerate(("system", "sweep", "setting")):
        table.insert(place + 1, column, pd.Series([name[place] for name in whole], dtype=object))
    table.insert(4, "recipe", [getattr(each, "recipe", "") for each in whole.values()])
    return table
