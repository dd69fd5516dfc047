"""Many knock-outs of the same images, each of which runs only what it can change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.measure.knockout.intervention import (
    Rule,
    at_random,
    knocked_out,
    mean_outputs,
    per_image,
)
from moee_analysis.measure.routing.resolve import batches_of
from moee_analysis.models.capture import watch
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.partial_forward import block_of, seeing_inputs, starting_at
from moee_analysis.moe.layer import moe_layers, moe_names


@dataclass(frozen=True)
class Plan:
    """Knock-outs by layer: rules, each followed by its controls, and what tokens get instead."""

    rules: Mapping[int, Sequence[Rule]]
    constants: Mapping[int, torch.Tensor]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        calibration: ImageSet,
        rules: Mapping[int, Mapping[tuple[int, ...], Rule]],
        *,
        controls: int,
        seed: int,
    ) -> Plan:
        """Take mean outputs over ``calibration``; ``seed`` and a rule's key seed its controls."""
        constants = mean_outputs(model, calibration, layers=list(rules))
        followed = {
            layer: with_controls(own, leading=len(constants[layer]) - 1, draws=controls, seed=seed)
            for layer, own in rules.items()
        }
        return cls(followed, constants)


@dataclass(frozen=True)
class Outcomes:
    """What a layer's knock-outs made of some images.

    ``knocked_out``: float32 (rules, images), share of an image's tokens that were knocked out.
    ``intact``: what was looked at without a knock-out, (images, ...).
    ``seen``: the same under each rule, (rules, images, ...).
    """

    layer: int
    knocked_out: torch.Tensor
    intact: torch.Tensor
    seen: torch.Tensor


Look = Callable[[torch.Tensor], torch.Tensor]
"""Runs a model on some images and returns what is of interest, (images, ...)."""


def interventions(
    model: nn.Module, x: torch.Tensor, plan: Plan, look: Look, *, size: int | None = None
) -> Iterator[Outcomes]:
    """Yield the outcomes of every layer's knock-outs on the images ``x``, layer by layer.

    A knock-out changes nothing before its layer, and nothing of an image without such tokens. So
    the images run once as they are, and each knock-out runs the rest of the network with what
    entered the layer's block, on the images that it touches, ``size`` at once (None: what fits).
    Rules see every batch once, in the order of the batches.
    """
    size, names, routed = fitting_batch(model, size), moe_names(model), moe_layers(model)
    blocks = {layer: block_of(model, names[layer]) for layer in plan.rules}
    routers = {layer: routed[layer].router for layer in plan.rules}
    chosen: dict[int, torch.Tensor] = {}
    known = [block for block in blocks.values() if block is not None]
    with watch(routers, chosen.__setitem__, "outputs"), seeing_inputs(known) as entering:
        intact = look(x)
    for layer, rules in plan.rules.items():
        experts = per_image(chosen[layer], len(x))
        masks = torch.stack([rule(experts) for rule in rules])
        block, inputs = blocks[layer], entering.get(blocks[layer])
        whole = inputs is None or len(inputs) != len(x)  # a block of windows starts no images
        seen = intact.repeat(len(rules), *(1 for _ in intact.shape))
        touched, images = masks.any(dim=2).nonzero(as_tuple=True)
        for rule, image in zip(touched.split(size), images.split(size), strict=True):
            given = partial(_given, masks[rule, image])
            start = starting_at(block, None if whole else inputs[image])
            with knocked_out(model, layer, given, plan.constants[layer]), start:
                seen[rule.to(seen.device), image.to(seen.device)] = look(x[image])
        yield Outcomes(layer, masks.float().mean(dim=2), intact, seen)


def measure_knock_outs(
    model: nn.Module,
    images: ImageSet,
    plan: Plan,
    judge: Callable[[torch.Tensor, slice], np.ndarray],
    *,
    look: Look | None = None,
    size: int | None = None,
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Run all knock-outs on all images, and ``judge`` what was seen: (rules, images, facts).

    Intact facts (images, facts); by layer the shares of tokens knocked out, float32 (rules,
    images), and facts (rules, images, facts).
    """
    intact, first = [], 0
    shares: dict[int, list[np.ndarray]] = {layer: [] for layer in plan.rules}
    facts: dict[int, list[np.ndarray]] = {layer: [] for layer in plan.rules}
    with evaluating(model):
        for x in batches_of(model, images, size, label="knock-outs"):
            place = slice(first, first + len(x))
            for one in interventions(model, x, plan, look or model, size=size):
                shares[one.layer].append(one.knocked_out.cpu().numpy())
                facts[one.layer].append(judge(one.seen, place))
            intact.append(judge(one.intact[None], place)[0])
            first += len(x)
    found = {
        layer: (np.concatenate(shares[layer], axis=1), np.concatenate(facts[layer], axis=1))
        for layer in plan.rules
    }
    return np.concatenate(intact), found


def with_controls(
    rules: Mapping[tuple[int, ...], Rule], *, leading: int, draws: int, seed: int
) -> list[Rule]:
    """Every rule followed by its controls: so many draws of as many tokens.

    The numbers that stand for a rule are part of the seed of its controls.
    """
    followed = []
    for key, rule in rules.items():
        seeds = ([seed, *key, draw] for draw in range(draws))
        followed += [rule, *(at_random(rule, leading=leading, seed=each) for each in seeds)]
    return followed


def average(values: np.ndarray, draws: int) -> np.ndarray:
    """Values (rules, ...) of :func:`with_controls` as (rules, 2, ...): own, and mean control."""
    each = values.reshape(-1, 1 + draws, *values.shape[1:])
    return np.stack([each[:, 0], each[:, 1:].mean(axis=1)], axis=1)


def _given(mask: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Rule that knocks out the tokens of ``mask``, whatever their experts."""
    return mask
