"""Knock experts out: chosen tokens of one layer get an output that no longer depends on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.token_kinds import leading_kinds
from moee_analysis.measure.routing.resolve import batches_of, check_any, choose_layers
from moee_analysis.models.capture import watch
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.moe.layer import MoeMlp, moe_layers, moe_names

Rule = Callable[[torch.Tensor], torch.Tensor]
"""From the expert of every token, int64 (images, tokens), to those knocked out, bool, alike."""


def removed(expert: int) -> Rule:
    """Knock out the tokens of ``expert``."""
    return lambda chosen: chosen == expert


def alone(expert: int) -> Rule:
    """Knock out the tokens of all experts but ``expert``."""
    return lambda chosen: chosen != expert


def at_random(rule: Rule, *, leading: int = 0, seed: int | Sequence[int] = 0) -> Rule:
    """Knock out as many tokens of every image as ``rule`` does, drawn at random.

    As many *of every image*: an image of a class that uses an expert much loses more tokens than
    others, and that alone can hurt it more. What is left beside this control is *which* tokens
    were lost. The ``leading`` tokens of an image stay those of the rule and only patches are
    drawn, since no patch can stand for a class token. Images are drawn for in the order in which
    they come, so batches of any size give the same.
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

    ``constant`` is (kinds, dim) as of :func:`mean_outputs`: a row for each leading token, the last
    for all patches. The router runs as before.

    Raises MoeeError: no such routed layer; on running the model, more than one expert per token.
    """
    site = _routed(model, layer)
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
    model: nn.Module, images: ImageSet, *, layers: Sequence[int] = (), batch_size: int | None = None
) -> dict[int, torch.Tensor]:
    """Mean output of the routed ``layers`` (empty: all) over the tokens of calibration images.

    A token that gets it keeps what all tokens of its kind have in common, and loses what depends
    on the token. A class token has little in common with patches, so each leading token has a mean
    of its own. By layer float32 (kinds, dim): a row for each leading token, the last for all
    patches. A few hundred images are enough.

    Raises MoeeError: no images, or a layer that is not routed.
    """
    check_any(images)
    sites = {layer: _routed(model, layer) for layer in (layers or moe_layers(model))}
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
                tokens[layer] = [1] * leading + [max(1, patches.shape[1])]
    counts = {layer: len(images) * total.new_tensor(tokens[layer]) for layer, total in sums.items()}
    return {layer: (sums[layer] / counts[layer][:, None]).float() for layer in sites}


def per_image(chosen: torch.Tensor, images: int) -> torch.Tensor:
    """Return the experts that a router chose, int64 (n, 1), as (images, tokens).

    A MoeeError refuses more than one expert per token.
    """
    if chosen.ndim != 2 or chosen.shape[1] != 1:
        raise MoeeError(
            "a layer with one expert per token", f"choices of shape {tuple(chosen.shape)}",
            "choose other layers, or a top-1 router",
        )  # fmt: skip
    return chosen.reshape(images, -1)


def _routed(model: nn.Module, layer: int) -> MoeMlp:
    known = moe_layers(model)
    choose_layers(known, [layer])
    return known[layer]
