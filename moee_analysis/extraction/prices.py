"""Prices in time: what layers take, dense and as experts, as measured once on this machine.

Each layer is timed on what it gets from a batch of calibration images, in torch's eager mode, in
the precision that it is taken apart in, by the threads that torch has.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import nn

from moee_analysis.extraction.attention import AttentionPlan
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import spread_images
from moee_analysis.extraction.experts.layer_experts import LayerExperts
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.models.attention import Factors, Reduction, low_rank
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.inputs import like
from moee_analysis.moe.autotune import measuring_at_once, seconds_of
from moee_analysis.moe.layer import MoeMlp, Readout
from moee_analysis.utils.environment import describe_machine
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build

SHARES = 0.25, 0.75  # of neurons, or of a head's dimensions, with which a layer is timed
ROUNDS = 5  # in which all take turns, beside the first
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

    ``whole`` is the dense model, ``rest`` what is left of it without the layers that may change,
    once tokens merge; ``dense`` are these layers as they are, by name. ``ways`` are prices by the
    name of the way, :data:`LOW_RANK` that of attentions, and that of the layer.
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
    dense: nn.Module,
    tokens: TokenSource,
    ways: Sequence[Way],
    attentions: Sequence[AttentionPlan],
    config: ExtractConfig,
) -> Prices:
    """Measure the prices of the layers that some ``ways`` convert, or find them in the store.

    ``dense`` is the model of the ``tokens`` before any of these merge.
    """
    device = next(dense.parameters()).device
    pieces = [config.for_batch, config.order, config.metric, config.refit, config.attention]
    ids = [[[e.site.name, e.assignment.digest] for e in w.layers if e.converted] for w in ways]
    facts = {"tokens": tokens.key, "ways": ids, "pieces": pieces}
    key = content_key(**facts, on=describe_machine(str(device)))

    def build(folder: Path) -> None:
        plans = {plan.site.name: plan for plan in attentions}
        found = _measure(dense, tokens, Trials(tokens.model, ways, plans, config))
        write_json(folder / FILE, asdict(found))

    folder = get_or_build(tokens.root, f"prices-{key}", build)
    return Prices.from_json(json.loads((folder / FILE).read_text()))


@dataclass(frozen=True)
class Trials:
    """Layers that are timed in the place of those of a ``model``; ``plans`` by name."""

    model: nn.Module
    ways: Sequence[Way]
    plans: Mapping[str, AttentionPlan]
    config: ExtractConfig

    @property
    def names(self) -> list[str]:
        """The layers that may change."""
        mlps = [e.site.name for way in self.ways for e in way.layers if e.converted]
        return list(dict.fromkeys([*mlps, *self.plans]))

    def of(self, name: str) -> dict[tuple[str, float], nn.Module]:
        """Layers by the name of the way, and the neurons of a token or the heads' dimensions."""
        module, found = self.model.get_submodule(name), {}
        for share in SHARES:
            if name in self.plans:
                found |= self._low_rank(module, self.plans[name], share)
            for way in self.ways:
                for layer in way.layers:
                    if layer.site.name == name and layer.converted:
                        found |= self._experts(module, way, layer, share)
        return found

    def _low_rank(
        self, attention: nn.Module, plan: AttentionPlan, share: float
    ) -> dict[tuple[str, float], nn.Module]:
        heads, head_dim = plan.site.heads, plan.site.head_dim
        rank = max(1, round(share * head_dim))
        same = torch.eye(head_dim)[:, :rank].expand(heads, -1, -1)
        factors, mean = Factors(same, same), torch.zeros(heads, head_dim)
        reduction = Reduction(factors, factors, mean, plan.queries)
        return {(LOW_RANK, 2 * heads * rank): low_rank(plan.site, attention, reduction)}

    def _experts(
        self, mlp: nn.Module, way: Way, layer: LayerExperts, share: float
    ) -> dict[tuple[str, float], nn.Module]:
        """The layer with the neurons of the highest scores, whichever experts these are of."""
        scores = way.scores_in(layer)
        kept = scores > np.quantile(scores, 1 - share)
        shift = mlp.fc2.weight.new_zeros(len(kept), mlp.fc2.out_features)
        readout = Readout(shift=None if self.config.refit == "none" else shift)
        experts, shares = list(map(np.flatnonzero, kept)), layer.statistics.shares
        routed = MoeMlp(mlp, layer.router(), experts, shares, readout)
        active = float(shares @ kept.sum(axis=1))
        return {(way.name, active): routed.to(mlp.fc1.weight.device).eval()}


def _measure(dense: nn.Module, tokens: TokenSource, trials: Trials) -> Prices:
    """As :func:`measure_prices`; every layer is timed while the model runs, on what it gets."""
    model, batch = tokens.model, _batch(tokens, trials.config.for_batch)
    modules = {name: model.get_submodule(name) for name in trials.names}
    layers = {name: {(DENSE, 0.0): modules[name], **trials.of(name)} for name in modules}
    seconds: defaultdict[Any, list[float]] = defaultdict(list)

    def see(name: str, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        for key, layer in layers[name].items():
            # without hooks, of which this is one
            compute = partial(layer.forward, *call[0], **call[1])
            seconds[name, *key].append(seconds_of(compute, batch.device))

    # in the first round, layers find out which way of computing them is the fastest
    with evaluating(dense), evaluating(model), measuring_at_once():
        for _ in progress(range(1 + ROUNDS), label="prices in time", total=1 + ROUNDS):
            for key, each in {"whole": dense, "merged": model}.items():
                seconds[key].append(seconds_of(partial(each, batch), batch.device))
            with watch(modules, see, "calls"):
                model(batch)
    # what other jobs do to a machine only adds to its times: the shortest are the surest
    surest = {key: min(rounds[1:]) for key, rounds in seconds.items()}
    return _prices(surest.pop("whole"), surest.pop("merged"), surest)


def _prices(whole: float, merged: float, seconds: Mapping[Timed, float]) -> Prices:
    """Prices by the seconds of the dense model, merged or not, and of all layers."""
    points: defaultdict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for (name, way, number), found in seconds.items():
        points[way, name].append((number, found))
    ways: defaultdict[str, dict[str, Price]] = defaultdict(dict)
    for (way, name), own in points.items():
        ways[way][name] = Price.through(*own)
    dense = {name: price.fixed for name, price in ways.pop(DENSE).items()}
    return Prices(whole, max(0.0, merged - sum(dense.values())), dense, dict(ways))


def _batch(tokens: TokenSource, size: int) -> torch.Tensor:
    """A batch of calibration images from all over the set, repeated where there are too few."""
    some = tokens.images.take(spread_images(len(tokens.images), most=size))
    images = torch.cat(list(some.batches(tokens.model)))
    return like(images.repeat(-(-size // len(images)), 1, 1, 1)[:size], tokens.model)
