"""All systems that need no training, side by side, at the same MACs and on the same images."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from moee_analysis import measure
from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.registry import STATIC, Asked, System, systems_named
from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, image_scores
from moee_analysis.measure.evaluation.comparison_table import (
    accuracy_of,
    balance_of,
    best_static,
    costs_of,
    layers_of,
    told_of,
)
from moee_analysis.measure.routing.bootstrap import over_seeds
from moee_analysis.models.loading import unwrapped
from moee_analysis.models.macs import MacCount, count
from moee_analysis.moe.expert_layer import counting_usage
from moee_analysis.moe.layer import set_dispatch, without_routing
from moee_analysis.utils.checks import seed_number, share, whole_number
from moee_analysis.utils.progress import progress, tell, unwatched
from moee_analysis.utils.storage.folders import scratch_folder
from moee_analysis.utils.storage.store import check_writable

Row = dict[str, Any]

POINTS = (0.20, 0.28, 0.36)
"""Shares of the dense model's MACs to save."""

BATCH = 64  # images that are timed at once
TOGETHER = 3e9  # bytes of models that see the images in one pass


@dataclass(frozen=True)
class Contest:
    """What all systems are made from and measured on.

    Raises
    ------
    MoeeError
        An image that is in both sets; classes that are not those of the model; a store that cannot
        be written to; an unknown preset, or no resamples.
    """

    dense: nn.Module
    calibration: ImageSet
    images: ImageSet
    preset: str = "small"
    store: str | Path | None = None
    resamples: int = 1000
    latency: bool = True

    def __post_init__(self) -> None:
        preset_named(self.preset)
        whole_number("resamples", self.resamples)
        object.__setattr__(self, "dense", unwrapped(self.dense))
        self.images.labels(self.dense)
        check_apart(self.calibration, self.images, use="used for calibration")


@dataclass(frozen=True)
class Entry:
    """One system as it was made: its models (``own`` and its controls), or why there are none."""

    name: str
    system: System
    seconds: float
    models: Mapping[str, nn.Module] = field(default_factory=dict)
    layers: tuple[Row, ...] = ()
    reason: str = ""

    @property
    def bytes(self) -> int:
        """What the models take in memory."""
        tensors = [t for model in self.models.values() for t in model.state_dict().values()]
        return sum(t.numel() * t.element_size() for t in tensors)


def compare(
    contest: Contest,
    *,
    macs_reductions: Sequence[float] = POINTS,
    seeds: Sequence[int] = (0,),
    systems: Sequence[str] | None = None,
) -> list[Row]:
    """Make every system at every budget with every seed, and measure all of them.

    Parameters
    ----------
    macs_reductions
        Shares of the dense model's MACs to save.
    systems
        Names in ``SYSTEMS``; None: all. A static one is always among
        them.

    Returns
    -------
    list of dict
        For each budget, seed and system what ``evaluate`` tells of a
        run, and ``system``, ``family``, ``seed``, ``macs_asked``, ``reduces_macs``; ``over_seeds``
        (``mean`` retention of all seeds, and ``low``, ``high``, its 95 % interval by a bootstrap of
        images and seeds); ``latency`` (of the first seed), ``balance`` (means over layers);
        ``controls``: ``random_routing``, ``constant_routing``, ``oracle_routing`` (None where there
        is nothing to route, or no best expert) and ``static_pruning``, the best static system at
        the same budget; ``seconds`` to make it with this store, and ``reason`` why there is no such
        model: then its numbers are None.

    Raises
    ------
    MoeeError
        No such system, no budget or seed or one out of its range, or calibration images among those
        to measure on.
    """
    if not seeds or not macs_reductions:
        raise MoeeError("a budget and a seed", "none", "name one of each")
    for saved in macs_reductions:
        share("macs_reductions", saved, whole=False)
    for seed in seeds:
        seed_number(seed, "seeds")
    named = systems_named(systems)
    if all(system.routed for system in named.values()):
        named = systems_named([*named, STATIC])
    with _with_store(contest) as stored:
        return [
            row
            for saved in macs_reductions
            for row in _at_budget(stored, named, saved, seeds=seeds)
        ]


def _at_budget(
    contest: Contest, systems: Mapping[str, System], saved: float, *, seeds: Sequence[int]
) -> list[Row]:
    """Rows of all systems with all seeds at one budget of MACs."""
    counted, found, right = count(contest.dense), [], {}
    for seed in seeds:
        asked = Asked(saved, contest.preset, seed)
        for group in _groups(_entries(contest, systems, asked)):
            new, scores = _measured(contest, group, asked, counted=counted, timed=seed == seeds[0])
            found += new
            right |= {(name, seed): each for name, each in scores.items()}
    return _finished(found, right, resamples=contest.resamples)


@contextmanager
def _with_store(contest: Contest) -> Iterator[Contest]:
    """A store of its own where there is none: all systems see the same recorded tokens."""
    if contest.store is not None:
        check_writable(Path(contest.store))
        yield contest
        return
    with scratch_folder("store") as folder:
        yield replace(contest, store=folder)


# Making


def _entries(contest: Contest, systems: Mapping[str, System], asked: Asked) -> Iterator[Entry]:
    label = f"systems at −{asked.macs_reduction:.0%} MACs, seed {asked.seed}"
    for name, system in progress(systems.items(), label=label):
        yield _made(contest, name, system, asked)


def _made(contest: Contest, name: str, system: System, asked: Asked) -> Entry:
    started = time.perf_counter()
    try:
        with unwatched():
            made = system.make(contest.dense, contest.calibration, asked, store=contest.store)
    except MoeeError as error:
        tell(f"{name}: {error}")
        return Entry(name, system, time.perf_counter() - started, reason=str(error))
    seconds = time.perf_counter() - started
    models = _with_controls(made, system, contest.dense, seed=asked.seed)
    return Entry(name, system, seconds, models, layers_of(made))


def _with_controls(
    made: Extraction | nn.Module, system: System, dense: nn.Module, *, seed: int
) -> dict[str, nn.Module]:
    model = made.model if isinstance(made, Extraction) else made
    if not system.routed:
        return {"own": model}
    controls = {
        "random_routing": randomly_routed(model, seed=seed),
        "constant_routing": constantly_routed(model),
    }
    if system.oracle is not None:
        controls["oracle_routing"] = system.oracle(model, dense)
    return {"own": model} | controls


def _groups(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries whose models fit into memory together."""
    group: list[Entry] = []
    for entry in entries:
        if group and sum(each.bytes for each in group) + entry.bytes > TOGETHER:
            yield group
            group = []
        group.append(entry)
    yield group


# Measuring


def _measured(
    contest: Contest, group: list[Entry], asked: Asked, *, counted: MacCount, timed: bool
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the systems of a group, and which images each gets right, (images,)."""
    models = {(e.name, kind): m for e in group for kind, m in e.models.items()}
    own = {e.name: e.models["own"] for e in group if e.models}
    told, right, usage = {}, {}, {}
    if models:
        with counting_usage(own) as usage, _masked(models.values()):
            scores = image_scores(models, contest.images, reference=contest.dense)
        told = told_of(scores, resamples=contest.resamples)
        right = {name: scores[name, "own"]["right"] for name in own}
        right[REFERENCE] = scores[REFERENCE]["right"]
    times = _times(contest, own) if timed else {}
    rows = [
        _first(entry, asked, len(contest.images))
        | accuracy_of(entry.name, told)
        | costs_of(own.get(entry.name), contest.dense, counted, usage.get(entry.name, {}))
        | {"latency": times.get(entry.name), "balance": None}
        | ({"balance": balance_of(usage.get(entry.name, {}))} if entry.system.routed else {})
        for entry in group
    ]
    return rows, right


def _first(entry: Entry, asked: Asked, images: int) -> Row:
    return {
        "system": entry.name,
        "family": entry.system.family,
        "seed": asked.seed,
        "macs_asked": asked.macs_reduction,
        "n_images": images,
        "seconds": round(entry.seconds, 1),
        "reason": entry.reason,
        "layers": list(entry.layers),
    }


@contextmanager
def _masked(models: Iterable[nn.Module]) -> Iterator[None]:
    """While open, layers are computed in the one way that needs no measuring first."""
    try:
        for model in models:
            set_dispatch(model, "masked")
        yield
    finally:
        for model in models:
            set_dispatch(model, "auto")


def _times(contest: Contest, models: Mapping[str, nn.Module]) -> dict[str, Row]:
    """Latency of each model; those that are pruned are timed without anything to route."""
    if not contest.latency or not models:
        return {}
    quickest = {name: without_routing(model) for name, model in models.items()}
    table = measure.latency(
        quickest, contest.images, reference=contest.dense, batch_size=BATCH, rounds=5, seconds=0.05
    )
    return {row.pop("system"): row for row in table.to_dict("records")}


def _finished(
    rows: list[Row], right: Mapping[tuple[str, int], np.ndarray], *, resamples: int
) -> list[Row]:
    """Add what only all rows of a budget know: intervals over seeds, and the best static system."""
    of_system: dict[str, list[np.ndarray]] = {}
    for (name, _seed), images in right.items():
        of_system.setdefault(name, []).append(images)
    own = of_system.pop(REFERENCE, [None])[0]
    spread = {n: over_seeds(np.stack(r), own, resamples=resamples) for n, r in of_system.items()}
    for row in rows:
        rivals = [other for other in rows if other["seed"] == row["seed"]]
        row["over_seeds"] = spread.get(row["system"])
        row["controls"]["static_pruning"] = best_static(rivals)
    return rows
