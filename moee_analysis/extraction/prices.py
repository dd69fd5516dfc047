"""Prices in time: what layers take, dense and as experts, as measured once on this machine.

Each layer is timed where it stands, while the model runs on a batch of calibration images, in
torch's eager mode, in the precision that it is taken apart in, by the threads that torch has.
"""

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.attention import AttentionPlan
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import spread_images
from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.models.attention import Factors, Reduction, low_rank
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.models.merging import merging_blocks
from moee_analysis.moe.autotune import measuring_at_once, seconds_of
from moee_analysis.moe.layer import MoeMlp, Readout, replace_module
from moee_analysis.utils.environment import describe_machine
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build

SHARES = 0.5, 1.0  # of neurons, or of a head's dimensions, with which a layer is timed
ROUNDS = 7  # in which all take turns, beside the first
FILE = "prices.json"
DENSE, LOW_RANK = "dense", "low rank"

Timed = tuple[str, str, float]  # layer, way, and neurons of a token or the heads' dimensions


@dataclass(frozen=True)
class Way:
    """A way to convert layers: those, not all of which it can, and the scores of their neurons.

    ``alike``: all tokens use the same neurons, but in layers that some tokens need none of.
    """

    name: str
    layers: Sequence[LayerExperts]
    scores: Mapping[str, np.ndarray]
    alike: bool = False

    def scores_in(self, layer: LayerExperts) -> np.ndarray:
        """Scores (experts, hidden) of a converted layer's neurons; 0 keeps none at any price."""
        scores = np.where(layer.constant[:, None], 0, self.scores[layer.site.name])
        if self.alike and not layer.constant.any():
            scores[:] = layer.statistics.shares @ scores
        return scores


@dataclass(frozen=True)
class Price:
    """Seconds: ``fixed``, and for ``each`` neuron that a token uses, or dimension of all heads."""

    fixed: float
    each: float

    @classmethod
    def through(cls, *points: tuple[float, float]) -> Self:
        """The line through points (number, seconds), which nowhere falls; level through one."""
        (few, less), (many, more) = min(points), max(points)
        each = max(0.0, more - less) / max(many - few, 1.0)
        return cls(max(0.0, less - each * few), each)


@dataclass(frozen=True)
class Prices:
    """Seconds of a batch.

    ``whole`` is the dense model before tokens merge, ``rest`` what is left of it then without the
    layers that may change; ``dense`` are these layers as they are, by name. ``ways`` are prices by
    the name of the way, :data:`LOW_RANK` that of attentions, and that of the layer.
    """

    whole: float
    rest: float
    dense: dict[str, float]
    ways: dict[str, dict[str, Price]]

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild prices from ``dataclasses.asdict`` after a trip through JSON."""
        ways = {
            way: {name: Price(**price) for name, price in own.items()}
            for way, own in content["ways"].items()
        }
        return cls(**{**content, "ways": ways})


def measure_prices(
    tokens: TokenSource,
    ways: Sequence[Way],
    attentions: Sequence[AttentionPlan],
    config: ExtractConfig,
    *,
    saved: float,
) -> Prices:
    """Measure the prices of the layers that some ``ways`` convert, or find them in the store.

    ``saved`` is the share of the dense model's time that merging has saved already.
    """
    device = next(tokens.model.parameters()).device
    pieces = [config.for_batch, config.order, config.metric, config.refit, config.attention]
    ids = [[[e.site.name, e.assignment.digest] for e in w.layers if e.converted] for w in ways]
    facts = {"tokens": tokens.key, "ways": ids, "pieces": pieces}
    key = content_key(**facts, on=describe_machine(str(device)))

    def build(folder: Path) -> None:
        trials = [*_low_rank(tokens.model, attentions), *_experts(tokens.model, ways, config)]
        batch = _batch(tokens.model, tokens.images, config.for_batch)
        write_json(folder / FILE, asdict(_measure(tokens.model, trials, batch)))

    folder = get_or_build(tokens.root, f"prices-{key}", build)
    prices = Prices.from_json(json.loads((folder / FILE).read_text()))
    return replace(prices, whole=prices.whole / (1 - saved))


@dataclass(frozen=True)
class Trial:
    """Layers of one way that are timed in the place of a model's own, by name.

    ``numbers`` are the neurons that a token of each uses, or the dimensions of its heads.
    """

    way: str
    layers: dict[str, nn.Module]
    numbers: dict[str, float]


def _low_rank(model: nn.Module, plans: Sequence[AttentionPlan]) -> Iterator[Trial]:
    """Attentions whose heads keep some of their dimensions, whichever."""
    for share in SHARES if plans else ():
        trial = Trial(LOW_RANK, {}, {})
        for plan in plans:
            heads, head_dim, name = plan.site.heads, plan.site.head_dim, plan.site.name
            rank = max(1, round(share * head_dim))
            same = torch.eye(head_dim)[:, :rank].expand(heads, -1, -1)
            factors, mean = Factors(same, same), torch.zeros(heads, head_dim)
            reduction = Reduction(factors, factors, mean, plan.queries)
            trial.layers[name] = low_rank(plan.site, model.get_submodule(name), reduction)
            trial.numbers[name] = 2 * heads * rank
        yield trial


def _experts(model: nn.Module, ways: Sequence[Way], config: ExtractConfig) -> Iterator[Trial]:
    """Layers with the neurons of the highest scores, whichever experts these are of."""
    for way, share in product(ways, SHARES):
        trial = Trial(way.name, {}, {})
        for layer in (layer for layer in way.layers if layer.converted):
            mlp, scores = layer.site.module(model), way.scores_in(layer)
            kept = scores >= np.quantile(scores, 1 - share)
            shift = mlp.fc2.weight.new_zeros(len(kept), mlp.fc2.out_features)
            readout = Readout(shift=None if config.refit == "none" else shift)
            experts, shares = list(map(np.flatnonzero, kept)), layer.statistics.shares
            routed = MoeMlp(mlp, layer.router(), experts, shares, readout)
            trial.layers[layer.site.name] = routed.to(mlp.fc1.weight.device).eval()
            trial.numbers[layer.site.name] = float(shares @ kept.sum(axis=1))
        yield trial


def _measure(model: nn.Module, trials: Sequence[Trial], batch: torch.Tensor) -> Prices:
    """As :func:`measure_prices`, of a dense ``model`` whose tokens may merge."""
    names = list(dict.fromkeys(name for trial in trials for name in trial.layers))
    own = Trial(DENSE, {name: model.get_submodule(name) for name in names}, dict.fromkeys(names, 0))
    layers: defaultdict[Timed, list[float]] = defaultdict(list)
    seconds: list[float] = []
    # in the first round, layers find out which way of computing them is the fastest
    with evaluating(model), measuring_at_once():
        for _ in progress(range(1 + ROUNDS), label="prices in time", total=1 + ROUNDS):
            for trial in (own, *trials):
                with exchanged(model, trial.layers), timing(trial.layers, batch.device) as took:
                    found = seconds_of(partial(model, batch), batch.device)
                if trial is own:
                    seconds.append(found)
                for name, number in trial.numbers.items():
                    layers[name, trial.way, number].append(took[name] / seconds[-1])
    # ratios within a round, and their medians: whatever else the machine does slows all alike
    whole = median(seconds[1:])
    return _prices(whole, {key: whole * median(each[1:]) for key, each in layers.items()})


@contextmanager
def exchanged(model: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """While open, ``layers`` stand in the place of a model's own."""
    own = {name: model.get_submodule(name) for name in layers}
    try:
        for name, layer in layers.items():
            replace_module(model, name, layer)
        yield
    finally:
        for name, layer in own.items():
            replace_module(model, name, layer)


@contextmanager
def timing(modules: Mapping[str, nn.Module], device: torch.device) -> Iterator[dict[str, float]]:
    """While open, a run of a model leaves the seconds of the quickest call of each module."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    begun: dict[str, float] = {}
    took: dict[str, float] = {}

    def begin(name: str, _: object) -> None:
        wait(device)
        begun[name] = time.perf_counter()

    def end(name: str, _: object) -> None:
        wait(device)
        took[name] = min(time.perf_counter() - begun[name], took.get(name, math.inf))

    with watch(modules, begin, "calls"), watch(modules, end, "outputs"):
        yield took


def _prices(whole: float, seconds: Mapping[Timed, float]) -> Prices:
    """Prices by the seconds of a model and of its layers."""
    points: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (name, way, number), found in seconds.items():
        points[way, name].append((number, found))
    ways: defaultdict[str, dict[str, Price]] = defaultdict(dict)
    for (way, name), own in points.items():
        ways[way][name] = Price.through(*own)
    dense = {name: price.fixed for name, price in ways.pop(DENSE).items()}
    return Prices(whole, max(0.0, whole - sum(dense.values())), dense, dict(ways))


def measure_saved_time(
    model: nn.Module, merged: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> float:
    """Share of the time of a dense ``model`` that merging saves in a batch, as measured once."""
    device, schedule = next(model.parameters()).device, merging_blocks(merged).schedule
    facts = {"model": fingerprint(model), "schedule": schedule, "batch": config.for_batch}

    def build(folder: Path) -> None:
        batch, shares = _batch(model, images, config.for_batch), []
        with evaluating(model), evaluating(merged):
            for _ in progress(range(1 + ROUNDS), label="time saved", total=1 + ROUNDS):
                whole, less = (seconds_of(partial(e, batch), device) for e in (model, merged))
                shares.append(1 - less / whole)
        write_json(folder / FILE, median(shares[1:]))

    key = content_key(**facts, on=describe_machine(str(device)))
    return json.loads((get_or_build(root, f"prices-{key}", build) / FILE).read_text())


def _batch(model: nn.Module, images: ImageSet, size: int) -> torch.Tensor:
    """A batch of images from all over the set, repeated where there are too few."""
    some = images.take(spread_images(len(images), most=size))
    batch = torch.cat(list(some.batches(model)))
    return like(batch.repeat(-(-size // len(batch)), 1, 1, 1)[:size], model)
