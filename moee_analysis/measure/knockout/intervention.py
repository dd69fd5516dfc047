"""Knock experts out: chosen tokens of one layer get an output that no longer depends on them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.measure.routing.inputs import Layers, batches_of, check_any, choose_routed
from moee_analysis.models.capture import block_of, evaluating, seeing_inputs, starting_at, watch
from moee_analysis.models.inputs import like
from moee_analysis.moe.layer import moe_layers, moe_names
from moee_analysis.utils.progress import progress

Rule = Callable[[torch.Tensor], torch.Tensor]
"""From the expert of every token, int64 (images, tokens), to those knocked out, bool, alike."""

Keyed = Mapping[tuple[int, ...], Rule]
"""Rules by numbers that, with a seed, are the seed of each one's control."""


def removed(expert: int) -> Rule:
    """Knock out the tokens of ``expert``."""
    return lambda chosen: chosen == expert


def alone(expert: int) -> Rule:
    """Knock out the tokens of all experts but ``expert``."""
    return lambda chosen: chosen != expert


def at_random(rule: Rule, *, leading: int = 0, seed: int | Sequence[int] = 0) -> Rule:
    """Knock out as many tokens of every image as ``rule`` does, drawn at random.

    As many *of every image*: one of a class that uses an expert much loses more tokens than others,
    and that alone can hurt it more. What is left beside this control is *which* tokens were lost.
    The ``leading`` tokens stay those of the rule, since no patch can stand for a class token.
    Images are drawn for in the order in which they come, so batches of any size give the same.
    """
    rng = np.random.default_rng(seed)

    def draw(chosen: torch.Tensor) -> torch.Tensor:
        mask = rule(chosen)
        keys = torch.from_numpy(rng.random(mask.shape)).to(mask.device)[:, leading:]
        ranks = keys.argsort(dim=1).argsort(dim=1)
        patches = ranks < mask[:, leading:].sum(dim=1, keepdim=True)
        return torch.cat([mask[:, :leading], patches], dim=1)

    return draw


@contextmanager
def knocked_out(
    model: nn.Module, layer: int, which: Rule, constant: torch.Tensor
) -> Iterator[nn.Module]:
    """While open, tokens of a routed layer chosen by ``which`` get ``constant`` for an output.

    ``constant`` is (kinds, dim) as of :func:`mean_outputs`. The router runs as before.
    Raises MoeeError: no such routed layer; on running the model, more than one expert per token.
    """
    site = choose_routed(model, [layer])[layer]
    seen: dict[str, torch.Tensor] = {}

    def replace(_: int, output: torch.Tensor) -> torch.Tensor:
        mask = which(per_image(seen["chosen"], len(seen["images"])))
        kinds = torch.arange(mask.shape[1], device=output.device).clamp(max=len(constant) - 1)
        tokens = output.reshape(*mask.shape, output.shape[-1])
        without = torch.where(mask[..., None], constant.to(tokens)[kinds], tokens)
        return without.reshape(output.shape)

    with (
        watch({"images": model}, seen.__setitem__),
        watch({"chosen": site.router}, seen.__setitem__, "outputs"),
        watch({layer: site}, replace, "outputs"),
    ):
        yield model


def mean_outputs(
    model: nn.Module, images: ImageSet, *, layers: Layers = (), batch_size: int | None = None
) -> dict[int, torch.Tensor]:
    """Mean output of the routed ``layers`` (empty: all) over the tokens of calibration images.

    A token that gets it keeps what all of its kind have in common, and loses what depends on the
    token. By layer float32 (kinds, dim): a row for each leading token, which has little in common
    with patches, the last for all of these. A few hundred images are enough.
    Raises MoeeError: no images, or a layer that is not routed.
    """
    check_any(images)
    sites = choose_routed(model, layers)
    names = moe_names(model)
    kinds = leading_kinds(model, [names[layer] for layer in sites])
    outputs: dict[int, torch.Tensor] = {}
    sums, tokens = {}, {}
    with evaluating(model), watch(sites, outputs.__setitem__, "outputs"):
        for x in batches_of(model, images, batch_size, label="mean outputs"):
            model(x)
            for layer, output in outputs.items():
                leading = len(kinds.get(names[layer], ()))
                y = output.reshape(len(x), -1, output.shape[-1]).double()
                each, patches = y[:, :leading], y[:, leading:]
                total = torch.cat([each.sum(0), patches.sum((0, 1))[None]])
                sums[layer] = sums.get(layer, 0) + total
                tokens[layer] = total.new_tensor([[1]] * leading + [[max(1, patches.shape[1])]])
    return {layer: (sums[layer] / (len(images) * tokens[layer])).float() for layer in sites}


@dataclass(frozen=True)
class Plan:
    """Knock-outs by layer: rules, each followed by its control, and what tokens get instead."""

    rules: Mapping[int, Sequence[Rule]]
    constants: Mapping[int, torch.Tensor]

    @classmethod
    def of(
        cls, model: nn.Module, calibration: ImageSet, rules: Mapping[int, Keyed], *, seed: int
    ) -> Self:
        """Take mean outputs over ``calibration``, and a control of every rule by its own seed."""
        constants = mean_outputs(model, calibration, layers=list(rules))
        followed: dict[int, list[Rule]] = {layer: [] for layer in rules}
        for layer, own in rules.items():
            leading = len(constants[layer]) - 1
            for key, rule in own.items():
                followed[layer] += [rule, at_random(rule, leading=leading, seed=[seed, *key, 0])]
        return cls(followed, constants)


Look = Callable[[torch.Tensor], torch.Tensor]
"""Runs a model on some images and returns what is of interest, (images, ...)."""

Outcomes = tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]
"""Layer; share of an image's tokens that each rule knocks out, float32 (rules, images); what was
looked at without a knock-out, (images, ...), and under each rule, (rules, images, ...)."""


def interventions(
    model: nn.Module, x: torch.Tensor, plan: Plan, look: Look, *, size: int
) -> Iterator[Outcomes]:
    """Yield the outcomes of every layer's knock-outs on the images ``x``, layer by layer.

    A knock-out changes nothing before its layer, and nothing of an image without such tokens. So
    the images run once as they are, and each knock-out runs the rest of the network with what
    entered the layer's block, on the images that it touches, ``size`` at once.
    """
    names, routed = moe_names(model), moe_layers(model)
    blocks = {layer: block_of(model, names[layer]) for layer in plan.rules}
    routers = {layer: routed[layer].router for layer in plan.rules}
    chosen: dict[int, torch.Tensor] = {}
    known = filter(None, blocks.values())
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
            start = starting_at(block, None if whole else inputs[image])
            lost = masks[rule, image]
            with knocked_out(model, layer, lambda _, m=lost: m, plan.constants[layer]), start:
                seen[rule.to(seen.device), image.to(seen.device)] = look(x[image])
        yield layer, masks.float().mean(dim=2), intact, seen


Judge = Callable[[torch.Tensor, slice], np.ndarray]
"""From what was looked at under each rule, and which images these are, (rules, images, facts)."""


def knock_out_all(
    model: nn.Module, images: ImageSet, plan: Plan, look: Look, judge: Judge, *, size: int
) -> tuple[np.ndarray, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Run all knock-outs on all images, ``size`` at once, and ``judge`` what was seen.

    Intact facts (images, facts); by layer shares of tokens knocked out, float32 (rules, images),
    and facts (rules, images, facts).
    """
    intact: dict[int, np.ndarray] = {}
    parts: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {layer: [] for layer in plan.rules}
    with evaluating(model):
        for number, batch in enumerate(images.batches(model, batch_size=size)):
            place = slice(number * size, (number + 1) * size)
            outcomes = interventions(model, like(batch, model), plan, look, size=size)
            bar = {"label": f"knock-outs, from image {place.start}", "total": len(plan.rules)}
            for layer, share, unchanged, seen in progress(outcomes, **bar):
                parts[layer].append((share.cpu().numpy(), judge(seen, place)))
                # the same whatever the layer
                intact[number] = judge(unchanged[None], place)[0]
    found = {
        layer: tuple(np.concatenate(each, axis=1) for each in zip(*of_layer, strict=True))
        for layer, of_layer in parts.items()
    }
    return np.concatenate(list(intact.values())), found


def per_image(chosen: torch.Tensor, images: int) -> torch.Tensor:
    """The experts that a router chose, int64 (n, 1), as (images, tokens); several are refused."""
    if chosen.ndim != 2 or chosen.shape[1] != 1:
        found = f"choices of shape {tuple(chosen.shape)}"
        hint = "choose other layers, or a top-1 router"
        raise MoeeError("a layer with one expert per token", found, hint)
    return chosen.reshape(images, -1)
