"""What each piece of a recipe is worth: configurations side by side, all on the same images."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from torch import nn

from moee_analysis.clustering import ClusterConfig
from moee_analysis.controls import randomly_routed
from moee_analysis.counting import MacCount, count, count_parameters
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import extract
from moee_analysis.layers import MoeMlp, all_mlps
from moee_analysis.measure.accuracy import accuracy
from moee_analysis.models import fingerprint
from moee_analysis.progress import progress
from moee_analysis.recipes import recipe_named
from moee_analysis.store import content_key, kept, write_json

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Mapping

    from moee_analysis.config import ExtractConfig
    from moee_analysis.extraction import Extraction
    from moee_analysis.images import ImageSet

    Variant = ExtractConfig | nn.Module

SCORES = ["top1", "low", "high", "retention", "retention_low", "retention_high", "agreement", "kl"]


def variants(
    dense: nn.Module,
    calibration: ImageSet,
    images: ImageSet,
    tried: Mapping[Hashable, Variant],
    *,
    store: str | Path,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Extract every configuration, and evaluate all of them in one pass over the images.

    Parameters
    ----------
    tried
        Configurations, or models made already that differ from the dense one in their MLPs, by
        the name of the variant.
    seed, resamples
        Of the image bootstrap.

    Returns
    -------
    DataFrame
        A row per variant: ``variant``; ``top1``, ``low``, ``high``, ``retention``,
        ``retention_low``, ``retention_high``, ``agreement``, ``kl`` as in ``measure.accuracy``,
        with the dense model as reference; ``macs_reduction`` and ``params_reduction``, shares of
        the dense model's, with the routing shares of the calibration; ``router_macs``, what the
        routers cost, as such a share; ``seconds`` the extraction
        took with this store when it was first asked for here, what the store held already not
        counted; ``reason`` why there is no such model: then all numbers are NaN.
    """
    made = _made(dense, calibration, tried.values(), Path(store))
    rows = [made.get(each) or _Made(model=each) for each in tried.values()]
    models = {str(place): row.model for place, row in enumerate(rows) if row.model is not None}
    table = pd.DataFrame({"variant": pd.Series(list(tried), dtype=object)})
    if models:
        scores = accuracy(models, images, reference=dense, seed=seed, resamples=resamples)
        scores.index = scores["system"].astype(int)
        table = table.join(scores[SCORES])
    counted = count(dense)
    costs = pd.DataFrame([_cost(row, dense, counted) for row in rows])
    table = table.reindex(columns=["variant", *SCORES]).join(costs)
    table.attrs["caption"] = (
        f"{len(images)} images evaluated, reference: the dense model; bars are 95 % intervals of "
        "the image bootstrap; MACs with the routing shares of the calibration."
    )
    return table


@dataclass(frozen=True)
class _Made:
    model: nn.Module | None = None
    run: Extraction | None = None
    seconds: float = math.nan
    reason: str = ""


def _made(
    dense: nn.Module, calibration: ImageSet, tried: Iterable[Variant], store: Path
) -> dict[Variant, _Made]:
    """Every distinct configuration among ``tried``, extracted."""
    configs = dict.fromkeys(each for each in tried if not isinstance(each, nn.Module))
    counted = progress(configs, label="variants")
    return {config: _extracted(dense, calibration, config, store) for config in counted}


def _extracted(
    dense: nn.Module, calibration: ImageSet, config: ExtractConfig, store: Path
) -> _Made:
    started = time.perf_counter()
    try:
        run = extract(dense, calibration, config, store=store)
    except MoeeError as error:
        return _Made(reason=str(error))
    seconds = time.perf_counter() - started
    facts = {"images": calibration.fingerprint, "config": asdict(config)}
    key = content_key(model=fingerprint(dense), **facts)
    folder = kept(store, f"seconds-{key}", lambda new: write_json(new / "seconds.json", seconds))
    return _Made(run.model, run, json.loads((folder / "seconds.json").read_text()))


def _cost(row: _Made, dense: nn.Module, counted: MacCount) -> dict[str, Any]:
    saved = dict.fromkeys(("macs_reduction", "params_reduction", "router_macs"), math.nan)
    if row.model is not None:
        mlps = all_mlps(row.model)
        cost = counted.replacing({name: _macs_per_token(mlp) for name, mlp in mlps.items()})
        saved["macs_reduction"] = 1 - cost / counted.total
        saved["params_reduction"] = 1 - count_parameters(row.model) / count_parameters(dense)
        routers = {name: mlp.router.macs for name, mlp in mlps.items() if isinstance(mlp, MoeMlp)}
        in_routers = sum(counted.tokens[name] * each for name, each in routers.items())
        saved["router_macs"] = in_routers / counted.total
    return {**saved, "seconds": row.seconds, "reason": row.reason}


def _macs_per_token(mlp: nn.Module) -> float:
    if isinstance(mlp, MoeMlp):
        return mlp.macs_per_token()
    return sum(linear.in_features * linear.out_features for linear in (mlp.fc1, mlp.fc2))


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
        The recipe that says what a piece is when it is off, and that each is added to.
    repeats
        How often the whole recipe is extracted again with another seed, and so from other
        calibration images, tokens and clusters: what differs by chance.
    bootstrap
        ``seed`` and ``resamples``, as for :func:`variants`.

    Returns
    -------
    DataFrame
        The columns of :func:`variants`, and: ``recipe``, that the variant starts from;
        ``piece``, the one that differs, and its ``value``; ``direction``: ``as it is``,
        ``another seed``, ``off in turn``, ``on alone`` or ``control``. The controls of both
        recipes are static pruning, random routing and random centres. The first row is the dense
        model.
    """
    whole = _tried(config, other)
    bases = {row["recipe"]: each for row, each in whole if row["direction"] == "as it is"}
    made = _made(dense, calibration, bases.values(), Path(store))
    for recipe, base in bases.items():
        if made[base].run is not None:
            control = randomly_routed(made[base].run, seed=bootstrap.get("seed", 0))
            whole.append((_row(recipe, "router", "random routing", "control"), control))
    for seed in range(config.seed + 1, config.seed + 1 + repeats):
        row = _row(config.recipe, "seed", str(seed), "another seed")
        whole.append((row, replace(config, seed=seed)))
    whole.insert(0, (_row("", "", "dense", "as it is"), dense))
    tried = {_name(row): each for row, each in whole}
    table = variants(dense, calibration, images, tried, store=store, **bootstrap)
    for place, column in enumerate(_row("", "", "", ""), start=1):
        table.insert(place, column, [row[column] for row, _ in whole])
    return table


def _tried(config: ExtractConfig, other: str) -> list[tuple[dict[str, str], ExtractConfig]]:
    """Rows of the table, and the configuration of each."""
    theirs = recipe_named(other)
    own = {piece: getattr(config.resolved(), piece) for piece in theirs}
    base = replace(config, recipe=other, **dict.fromkeys(own))
    found = []
    for start, pieces, direction in ((config, theirs, "off in turn"), (base, own, "on alone")):
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
    return "random" if value.method == "random" else f"{value.method} of {value.space}"


def sweeps(
    dense: nn.Module,
    calibration: ImageSet,
    images: ImageSet,
    tried: Mapping[str, Mapping[str, Mapping[Any, Variant]]],
    *,
    store: str | Path,
    **bootstrap: int,
) -> pd.DataFrame:
    """Vary one quantity at a time, in one or several systems.

    Parameters
    ----------
    tried
        By system and by name of the sweep: a configuration, or a model made already, by its
        setting. The setting None is for what does not depend on any.
    bootstrap
        ``seed`` and ``resamples``, as for :func:`variants`.

    Returns
    -------
    DataFrame
        The columns of :func:`variants` with ``system``, ``sweep`` and ``setting`` in the place of
        ``variant``.
    """
    whole = {
        (system, sweep, setting): each
        for system, by_sweep in tried.items()
        for sweep, by_setting in by_sweep.items()
        for setting, each in by_setting.items()
    }
    table = variants(dense, calibration, images, whole, store=store, **bootstrap)
    for place, column in enumerate(("system", "sweep", "setting")):
        table.insert(place, column, pd.Series([name[place] for name in whole], dtype=object))
    return table.drop(columns="variant")
