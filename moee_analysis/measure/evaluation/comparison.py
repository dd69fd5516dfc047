"""All systems that need no training, side by side, at the same MACs and on the same images."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.registry import STATIC, Asked, System, systems_named
from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, score_images, summarize
from moee_analysis.measure.evaluation.comparison_table import CONTROLS, STATIC_FAMILY
from moee_analysis.measure.evaluation.engine import Made, costs_of, make
from moee_analysis.measure.evaluation.evaluate import ACCURACY, accuracy_numbers
from moee_analysis.measure.evaluation.latency import latency
from moee_analysis.measure.routing.bootstrap import over_seeds
from moee_analysis.measure.routing.load_balance import METRICS, balance_metrics
from moee_analysis.models.loading import unwrapped
from moee_analysis.models.macs import MacCount, count, count_parameters
from moee_analysis.moe.expert_layer import counting_usage, expert_layers
from moee_analysis.moe.layer import MoeMlp, set_dispatch, without_routing
from moee_analysis.utils.checks import seed_number, share, whole_number
from moee_analysis.utils.progress import progress, tell, unwatched
from moee_analysis.utils.storage.folders import scratch_folder
from moee_analysis.utils.storage.store import check_writable

Row = dict[str, Any]
Usage = Mapping[str, torch.Tensor]

POINTS = (0.20, 0.28, 0.36)
"""Shares of the dense model's MACs to save."""

BATCH = 64  # images that are timed at once
TOGETHER = 3e9  # bytes of models that see the images in one pass


@dataclass(frozen=True)
class Contest:
    """What all systems are made from and measured on.

    Raises MoeeError: an image that is in both sets; classes that are not those of the model; a
    store that cannot be written to; an unknown preset, or no resamples.
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
        check_disjoint(self.calibration, self.images, use="used for calibration")


@dataclass(frozen=True)
class Entry:
    """One system as it was made, with its model (``own``) and its controls, if there are any."""

    name: str
    system: System
    made: Made
    models: Mapping[str, nn.Module] = field(default_factory=dict)

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

    ``macs_reductions``: shares of the dense model's MACs to save.
    ``systems``: names in ``SYSTEMS``; None: all. A static one is always among them.

    For each budget, seed and system what ``evaluate`` tells of a run, and ``system``, ``family``,
    ``seed``, ``macs_asked``, ``reduces_macs``; ``over_seeds`` (``mean`` retention of all seeds, and
    ``low``, ``high``, its 95 % interval by a bootstrap of images and seeds); ``latency`` (of the
    first seed), ``balance`` (means over layers); ``controls``: ``random_routing``,
    ``constant_routing``, ``oracle_routing`` (None where there is nothing to route, or no best
    expert) and ``static_pruning``, the best static system at the same budget; ``seconds`` to make
    it with this store, and ``reason`` why there is no such model: then its numbers are None.
    Raises MoeeError: no such system, no budget or seed or one out of its range, or calibration
    images among those to measure on.
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
    rows = []
    with _with_store(contest) as stored:
        for saved in macs_reductions:
            rows += _compare_at(stored, named, saved, seeds)
    return rows


@contextmanager
def _with_store(contest: Contest) -> Iterator[Contest]:
    """A store of its own where there is none: all systems see the same recorded tokens."""
    if contest.store is not None:
        check_writable(Path(contest.store))
        yield contest
        return
    with scratch_folder("store") as folder:
        yield replace(contest, store=folder)


def _compare_at(
    contest: Contest, systems: Mapping[str, System], saved: float, seeds: Sequence[int]
) -> list[Row]:
    """Rows of all systems with all seeds at one budget of MACs."""
    counted, rows, right = count(contest.dense), [], {}
    for seed in seeds:
        asked, of_seed = Asked(saved, contest.preset, seed), []
        for group in _fit_together(_make_entries(contest, systems, asked)):
            new, hits = _measure(contest, group, counted, timed=seed == seeds[0])
            of_seed += [
                _first(entry, asked, len(contest.images)) | new[entry.name] for entry in group
            ]
            for name, images in hits.items():
                right.setdefault(name, {})[seed] = images
        static = _best_static(of_seed)
        for row in of_seed:
            row["controls"]["static_pruning"] = static
        rows += of_seed
    own = next(iter(right.pop(REFERENCE, {}).values()), None)
    spread = {
        name: over_seeds(np.stack(list(hits.values())), own, resamples=contest.resamples)
        for name, hits in right.items()
    }
    return [row | {"over_seeds": spread.get(row["system"])} for row in rows]


# Making


def _make_entries(contest: Contest, systems: Mapping[str, System], asked: Asked) -> Iterator[Entry]:
    label = f"systems at −{asked.macs_reduction:.0%} MACs, seed {asked.seed}"
    for name, system in progress(systems.items(), label=label):
        sources = contest.dense, contest.calibration, asked
        with unwatched():
            made = make(partial(system.make, *sources, store=contest.store))
        if made.model is None:
            tell(f"{name}: {made.reason}")
            yield Entry(name, system, made)
        else:
            yield Entry(name, system, made, _with_controls(made.model, system, contest, asked.seed))


def _with_controls(
    model: nn.Module, system: System, contest: Contest, seed: int
) -> dict[str, nn.Module]:
    models = {"own": model}
    if system.routed:
        models["random_routing"] = randomly_routed(model, seed=seed)
        models["constant_routing"] = constantly_routed(model)
    if system.routed and system.oracle is not None:
        models["oracle_routing"] = system.oracle(model, contest.dense)
    return models


def _fit_together(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries in groups whose models fit into memory together."""
    group: list[Entry] = []
    for entry in entries:
        if group and sum(each.bytes for each in group) + entry.bytes > TOGETHER:
            yield group
            group = []
        group.append(entry)
    yield group


# Measuring


def _measure(
    contest: Contest, group: list[Entry], counted: MacCount, *, timed: bool
) -> tuple[dict[str, Row], dict[str, np.ndarray]]:
    """Numbers of the systems of a group, and which images each gets right, (images,)."""
    models = {(e.name, kind): m for e in group for kind, m in e.models.items()}
    own = {e.name: e.models["own"] for e in group if e.models}
    accuracies, right, usage = {}, {}, {}
    if models:
        with counting_usage(own) as usage, _masked(models.values()):
            scores = score_images(models, contest.images, reference=contest.dense)
        table = summarize(scores, resamples=contest.resamples)
        accuracies = {row["system"]: accuracy_numbers(row) for row in table.to_dict("records")}
        right = {name: scores[name, "own"]["right"] for name in own}
        right[REFERENCE] = scores[REFERENCE]["right"]
    times = _time(contest, own) if timed and contest.latency and own else {}
    rows = {}
    for entry in group:
        name, used = entry.name, usage.get(entry.name, {})
        rows[name] = accuracies.get((name, "own"), dict.fromkeys(ACCURACY)) | {
            "controls": {kind: _control(accuracies.get((name, kind))) for kind in CONTROLS},
            **_costs(own.get(name), contest.dense, counted, used),
            "latency": times.get(name),
            "balance": _balance(used) if entry.system.routed else None,
        }
    return rows, right


def _first(entry: Entry, asked: Asked, images: int) -> Row:
    return {
        "system": entry.name,
        "family": entry.system.family,
        "seed": asked.seed,
        "macs_asked": asked.macs_reduction,
        "n_images": images,
        "seconds": round(entry.made.seconds, 1),
        "reason": entry.made.reason,
        "layers": _describe_layers(entry.made.result),
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


def _time(contest: Contest, models: Mapping[str, nn.Module]) -> dict[str, Row]:
    """Latency of each model; those that are pruned are timed without anything to route."""
    quickest = {name: without_routing(model) for name, model in models.items()}
    table = latency(
        quickest, contest.images, reference=contest.dense, batch_size=BATCH, rounds=5, seconds=0.05
    )
    return {row.pop("system"): row for row in table.to_dict("records")}


def _costs(model: nn.Module | None, dense: nn.Module, counted: MacCount, usage: Usage) -> Row:
    """MACs as experts were used, and parameters, of ``model`` and of the dense one."""
    costs: Row = {} if model is None else costs_of(model, dense, counted, usage)
    return {
        "macs_dense": float(counted.total),
        "params_dense": count_parameters(dense),
        "macs_moe": costs.get("macs"),
        "macs_reduction": costs.get("macs_reduction"),
        "reduces_macs": costs["macs_reduction"] > 0 if costs else None,
        "params_moe": costs.get("params"),
        "params_reduction": costs.get("params_reduction"),
    }


def _balance(usage: Usage) -> dict[str, float] | None:
    """Metrics of ``measure.balance``, means over layers; None where there is nothing to route."""
    layers = [balance_metrics(used.numpy()) for used in usage.values() if len(used) > 1]
    if not layers:
        return None
    return {name: float(np.mean([layer[name] for layer in layers])) for name in METRICS}


def _control(numbers: Row | None) -> Row | None:
    return numbers and {name.removeprefix("moe_"): value for name, value in numbers.items()}


def _best_static(rows: Iterable[Row]) -> Row | None:
    """The static system among ``rows`` that keeps most, as a control of the others."""
    known = [r for r in rows if r["family"] == STATIC_FAMILY and r["retention"] is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row["retention"])
    return {"system": best["system"]} | {name: best[name] for name in ACCURACY}


def _describe_layers(made: Extraction | nn.Module | None) -> list[Row]:
    """What each layer has become; only an extraction knows of noise, and of layers left dense."""
    if made is None:
        return []
    if isinstance(made, Extraction):
        return [asdict(layer) for layer in made.layers]
    return [_describe_layer(name, layer) for name, layer in expert_layers(made).items()]


def _describe_layer(name: str, layer: nn.Module) -> Row:
    row = {"name": name, "experts": layer.n_experts, "converted": True, "reason": ""}
    row |= {"noise_share": None, "active_fraction": None, "union_fraction": None}
    if isinstance(layer, MoeMlp):
        active = torch.dot(layer.shares.double(), layer.sizes.double()).item()
        row["active_fraction"] = active / layer.hidden_dense
        row["union_fraction"] = len(layer.kept) / layer.hidden_dense
    return row
