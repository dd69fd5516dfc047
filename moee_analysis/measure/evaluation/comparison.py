"""All systems that need no training, side by side, at the same MACs and on the same images."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.registry import STATIC, Asked, System, systems_named
from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, score_images, summarize
from moee_analysis.measure.evaluation.evaluate import ACCURACY, accuracy_numbers
from moee_analysis.measure.evaluation.latency import latency
from moee_analysis.measure.evaluation.mac_table import fractions
from moee_analysis.measure.evaluation.variants import Made, costs_of, make
from moee_analysis.measure.routing.bootstrap import over_seeds
from moee_analysis.measure.routing.inputs import Run
from moee_analysis.measure.routing.load_balance import METRICS, balance_metrics
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.loading import unwrapped
from moee_analysis.models.macs import MacCount, count, count_parameters
from moee_analysis.moe.layer import counting_usage, expert_layers, set_dispatch, without_routing
from moee_analysis.utils.checks import seed_number, share, whole_number
from moee_analysis.utils.progress import progress, tell, unwatched
from moee_analysis.utils.storage.folders import scratch_folder
from moee_analysis.utils.storage.store import check_writable

Row = dict[str, Any]

POINTS = (0.20, 0.28, 0.36)  # shares of the dense model's MACs to save
CONTROLS = ("random_routing", "constant_routing", "oracle_routing")
BATCH = 64  # images that are timed at once
TOGETHER = 3e9  # bytes of models that see the images in one pass


@dataclass(frozen=True)
class Contest:
    """What all systems are made from and measured on.

    Raises MoeeError: an image in both sets, classes not of the model, no such preset, no resamples.
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
    asked: Asked
    system: System
    made: Made
    models: Mapping[str, nn.Module]


def compare(
    contest: Contest,
    *,
    macs_reductions: Sequence[float] = POINTS,
    seeds: Sequence[int] = (0,),
    systems: Sequence[str] | None = None,
) -> list[Row]:
    """Make every system at every budget with every seed, and measure all of them.

    ``macs_reductions`` are shares of the dense model's MACs to save, ``systems`` names in
    ``SYSTEMS``; None: all. A static one is always among them.

    For each budget, seed and system what ``evaluate`` tells of a run, and ``system``, ``family``,
    ``seed``, ``macs_asked``, ``reduces_macs``; ``over_seeds`` (``mean`` retention of all seeds, and
    its 95 % interval ``low``, ``high`` by a bootstrap of images and seeds); ``latency`` (of the
    first seed), ``balance`` (means over layers); ``controls``: those of :data:`CONTROLS` (None
    where there is nothing to route, or no best expert) and ``static_pruning``, the best static
    system at the same budget; ``seconds`` to make it with this store, and ``reason`` why there is
    no such model: then its numbers are None.
    Raises MoeeError: no such system, no budget or seed, or one out of its range.
    """
    if not seeds or not macs_reductions:
        raise MoeeError("a budget and a seed", "none", "name one of each")
    for saved in macs_reductions:
        share("macs_reductions", saved, whole=False)
    for seed in seeds:
        seed_number(seed, "seeds")
    named = systems_named(systems)
    if not any(system.prunes for system in named.values()):
        named = systems_named([*named, STATIC])
    with ExitStack() as stack:
        if contest.store is None:  # all systems see the same recorded tokens
            contest = replace(contest, store=stack.enter_context(scratch_folder("store")))
        check_writable(Path(contest.store))
        at = (_compare_at(contest, named, saved, seeds) for saved in macs_reductions)
        return [row for rows in at for row in rows]


def _compare_at(
    contest: Contest, systems: Mapping[str, System], saved: float, seeds: Sequence[int]
) -> list[Row]:
    """Rows of all systems with all seeds at one budget of MACs."""
    counted, rows, right = count(contest.dense), [], defaultdict(list)
    for seed in seeds:
        entries, of_seed = _make_entries(contest, systems, Asked(saved, contest.preset, seed)), []
        for group in _fit_together(entries):
            new, hits = _measure(contest, group, counted, timed=seed == seeds[0])
            of_seed += new
            for name, images in hits.items():
                right[name].append(images)
        static = [row for row in of_seed if systems[row["system"]].prunes]
        known = [row for row in static if row["retention"] is not None]
        best = max(known, key=lambda row: row["retention"], default=None)
        control = best and {name: best[name] for name in ("system", *ACCURACY)}
        for row in of_seed:
            row["controls"]["static_pruning"] = control
        rows += of_seed
    own, drawn = right.pop(REFERENCE, [None])[0], {"resamples": contest.resamples}
    spread = {name: over_seeds(np.stack(hits), own, **drawn) for name, hits in right.items()}
    return [row | {"over_seeds": spread.get(row["system"])} for row in rows]


def _make_entries(contest: Contest, systems: Mapping[str, System], asked: Asked) -> Iterator[Entry]:
    label = f"systems at −{asked.macs_reduction:.0%} MACs, seed {asked.seed}"
    for name, system in progress(systems.items(), label=label):
        sources = contest.dense, contest.calibration, asked
        with unwatched():
            made = make(partial(system.make, *sources, store=contest.store))
        if made.model is None:
            tell(f"{name}: {made.reason}")
        models = {} if made.model is None else {"own": made.model}
        if models and system.routed:
            models["random_routing"] = randomly_routed(made.model, seed=asked.seed)
            models["constant_routing"] = constantly_routed(made.model)
            if system.oracle is not None:
                models["oracle_routing"] = system.oracle(made.model, contest.dense)
        yield Entry(name, asked, system, made, models)


def _fit_together(entries: Iterable[Entry]) -> Iterator[list[Entry]]:
    """Entries in groups whose models fit into memory together."""
    group, size = [], 0
    for entry in entries:
        models = entry.models.values()
        own = sum(tensor.nbytes for model in models for tensor in model.state_dict().values())
        if group and size + own > TOGETHER:
            yield group
            group, size = [], 0
        group.append(entry)
        size += own
    yield group


def _measure(
    contest: Contest, group: list[Entry], counted: MacCount, *, timed: bool
) -> tuple[list[Row], dict[str, np.ndarray]]:
    """Rows of the systems of a group, and which images each gets right, (images,)."""
    models = {(each.name, kind): m for each in group for kind, m in each.models.items()}
    own = {each.name: each.models["own"] for each in group if each.models}
    accuracies, right, usage, times = {}, {}, {}, {}
    if models:
        with counting_usage(own) as usage, ExitStack() as stack:
            for model in models.values():  # in the one way that needs no measuring first
                stack.callback(set_dispatch, model, "auto")
                set_dispatch(model, "masked")
            scores = score_images(models, contest.images, reference=contest.dense)
        table = summarize(scores, resamples=contest.resamples)
        accuracies = {row["system"]: accuracy_numbers(row) for row in table.to_dict("records")}
        right = {name: scores[name, "own"]["right"] for name in own}
        right[REFERENCE] = scores[REFERENCE]["right"]
    if timed and contest.latency and own:
        # those that are pruned are timed without anything to route
        quickest = {name: without_routing(model) for name, model in own.items()}
        options = {"batch_size": BATCH, "rounds": 3, "seconds": 0.05}
        table = latency(quickest, contest.images, reference=contest.dense, **options)
        times = {row.pop("system"): row for row in table.to_dict("records")}
    facts = contest, counted, accuracies
    rows = [_describe(each, *facts, usage.get(each.name, {})) for each in group]
    return [row | {"latency": times.get(row["system"])} for row in rows], right


def _describe(
    entry: Entry, contest: Contest, counted: MacCount, accuracies: Mapping, usage: Mapping
) -> Row:
    """What a system keeps and costs, as its experts were used."""
    name, system, model = entry.name, entry.system, entry.models.get("own")
    costs = {} if model is None else costs_of(model, contest.dense, counted, usage)
    several = [used.numpy() for used in usage.values() if system.routed and len(used) > 1]
    layers = [balance_metrics(used) for used in several]
    balance = {name: float(np.mean([each[name] for each in layers])) for name in METRICS if layers}
    controls = {kind: accuracies.get((name, kind)) for kind in CONTROLS}
    return {
        "system": name,
        "family": system.family,
        "seed": entry.asked.seed,
        "macs_asked": entry.asked.macs_reduction,
        "n_images": len(contest.images),
        "seconds": round(entry.made.seconds, 1),
        "reason": entry.made.reason,
        "layers": _describe_layers(entry.made.result),
        **accuracies.get((name, "own"), dict.fromkeys(ACCURACY)),
        "controls": {
            kind: found and {key.removeprefix("moe_"): value for key, value in found.items()}
            for kind, found in controls.items()
        },
        "macs_dense": float(counted.total),
        "params_dense": count_parameters(contest.dense),
        "macs_moe": costs.get("macs"),
        "macs_reduction": costs.get("macs_reduction"),
        "reduces_macs": costs["macs_reduction"] > 0 if costs else None,
        "params_moe": costs.get("params"),
        "params_reduction": costs.get("params_reduction"),
        "balance": balance or None,
    }


def _describe_layers(made: Run | None) -> list[Row]:
    """What each layer has become; only an extraction knows of noise, and of layers left dense."""
    if made is None:
        return []
    if isinstance(made, Extraction):
        return [asdict(layer) for layer in made.layers]
    layers = expert_layers(made).items()
    facts = {"converted": True, "reason": "", "noise_share": None}
    return [{"name": name, "experts": m.n_experts} | facts | fractions(m) for name, m in layers]


def comparison_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows of :func:`compare` as a tidy table.

    A row for each system, budget and seed: ``system``, ``family``, ``macs_asked``, ``seed``,
    ``top1``, ``dense_top1``, ``retention``, ``retention_low``, ``retention_high``, ``agreement``,
    ``kl``; ``mean``, ``low``, ``high`` (retention over all seeds); ``macs_reduction``,
    ``params_reduction``, ``reduces_macs``; ``speed_up`` over the dense model's time; the metrics of
    ``measure.balance``, means over layers; retention of the controls, by their names; ``seconds``,
    ``reason``. What is not known is nan.
    """
    rows = list(rows)
    ends = pd.DataFrame([row["retention_interval"] or (None, None) for row in rows])
    table = pd.json_normalize(rows).rename(columns=_COLUMNS)
    table = table.assign(retention_low=ends.get(0), retention_high=ends.get(1))
    columns = ["system", "family", "macs_asked", "seed", *_NUMBERS, "reduces_macs", "reason"]
    kinds = dict.fromkeys(_NUMBERS, float) | {"reduces_macs": bool}
    table = table.reindex(columns=columns).astype(kinds)
    seeds, timed = {row["seed"] for row in rows}, ""
    if times := next((row["latency"] for row in rows if row["latency"]), None):
        timed = f"; times of batches of {times['batch_size']} with {times['threads']} threads"
    return add_caption(
        table,
        f"{rows[0]['n_images'] if rows else 0} images evaluated, reference: the dense model; "
        f"{len(seeds)} seed{'s' * (len(seeds) > 1)}, bars are 95 % intervals of a bootstrap of "
        f"images and seeds; MACs as experts are used on these images, routers included{timed}.",
    )


_RETENTIONS = (*CONTROLS, "static_pruning")
_COLUMNS = {"moe_top1": "top1", "latency.speed_up": "speed_up"}
_COLUMNS |= {f"over_seeds.{name}": name for name in ("mean", "low", "high")}
_COLUMNS |= {f"balance.{name}": name for name in METRICS}
_COLUMNS |= {f"controls.{name}.retention": name for name in _RETENTIONS}
_NUMBERS = (
    "top1", "dense_top1", "retention", "retention_low", "retention_high", "agreement", "kl",
    "mean", "low", "high", "macs_reduction", "params_reduction", "speed_up", *METRICS,
    *_RETENTIONS, "seconds",
)  # fmt: skip
