"""Knock experts out: chosen tokens of one layer get an output that no longer depends on them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.token_kinds import leading_kinds
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.moe.layer import MoeMlp, moe_layers, moe_names
from moee_analysis.utils.progress import progress

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

    def drawn(chosen: torch.Tensor) -> torch.Tensor:
        mask = rule(chosen)
        keys = torch.from_numpy(rng.random(mask.shape)).to(mask.device)[:, leading:]
        ranks = keys.argsort(dim=1).argsort(dim=1)
        patches = ranks < mask[:, leading:].sum(dim=1, keepdim=True)
        return torch.cat([mask[:, :leading], patches], dim=1)

    return drawn


@contextmanager
def knocked_out(
    model: nn.Module, layer: int, which: Rule, constant: torch.Tensor
) -> Iterator[nn.Module]:
    """While open, chosen tokens of a routed layer of ``model`` get a constant for an output.

    The router runs as before, the hooks come off on leaving, also after an error.

    Parameters
    ----------
    layer
        Index of the layer, counted from 0.
    which
        Which tokens, by the experts that the router chose: :func:`removed`, :func:`alone`,
        :func:`at_random`.
    constant
        What the MLP gives instead, as :func:`mean_outputs` says: (kinds, dim), a row for each
        leading token and the last for all patches.

    Raises
    ------
    MoeeError
        No such routed layer; on running the model, more than one expert per token.
    """
    site = _routed(model, layer)
    seen: dict[str, int | torch.Tensor] = {}

    def see_images(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        seen["images"] = len(args[0])

    def see_choice(_: nn.Module, __: object, chosen: torch.Tensor) -> None:
        seen["chosen"] = per_image(chosen, seen["images"])

    def replace(_: nn.Module, __: object, output: torch.Tensor) -> torch.Tensor:
        mask = which(seen["chosen"])
        kinds = torch.arange(mask.shape[1], device=output.device).clamp(max=len(constant) - 1)
        tokens = output.reshape(*mask.shape, output.shape[-1])
        without = torch.where(mask[..., None], constant.to(tokens)[kinds], tokens)
        return without.reshape(output.shape)

    with ExitStack() as hooks:
        hooks.callback(model.register_forward_pre_hook(see_images).remove)
        hooks.callback(site.router.register_forward_hook(see_choice).remove)
        hooks.callback(site.register_forward_hook(replace).remove)
        yield model


def mean_outputs(
    model: nn.Module,
    images: ImageSet,
    *,
    layers: Sequence[int] = (),
    batch_size: int | None = None,
) -> dict[int, torch.Tensor]:
    """Mean output of the routed layers over the tokens of some images, by layer index.

    A token that gets it keeps what all tokens of its kind have in common, and loses what depends
    on the token. A class token has little in common with patches, so each leading token has a mean
    of its own.

    Parameters
    ----------
    images
        Calibration images; a few hundred are enough.
    layers
        Layers counted from 0; empty: all that are routed.

    Returns
    -------
    dict
        float32 (kinds, dim): a row for each leading token, the last for all patches.

    Raises
    ------
    MoeeError
        No images, or a layer that is not routed.
    """
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")
    sites = {layer: _routed(model, layer) for layer in (layers or moe_layers(model))}
    names = moe_names(model)
    kinds = leading_kinds(model, [names[layer] for layer in sites])
    sums = {layer: _Sums(site, len(kinds.get(names[layer], ()))) for layer, site in sites.items()}
    batch_size, like = fitting_batch(model, batch_size), next(model.parameters())
    batches = progress(
        images.batches(model, batch_size=batch_size),
        label="mean outputs",
        total=math.ceil(len(images) / batch_size),
    )
    with evaluating(model), ExitStack() as hooks:
        for each in sums.values():
            hooks.callback(each.site.register_forward_hook(each.add).remove)
        for x in batches:
            for each in sums.values():
                each.images = len(x)
            model(x.to(like))
    return {layer: each.means() for layer, each in sums.items()}


def per_image(chosen: torch.Tensor, images: int) -> torch.Tensor:
    """Return the experts that a router chose, int64 (n, 1), as (images, tokens).

    Raises
    ------
    MoeeError
        More than one expert per token.
    """
    if chosen.ndim != 2 or chosen.shape[1] != 1:
        raise MoeeError(
            "a layer with one expert per token", f"choices of shape {tuple(chosen.shape)}",
            "choose other layers, or a top-1 router",
        )  # fmt: skip
    return chosen.reshape(images, -1)


class _Sums:
    """Sums of the outputs of one layer over leading tokens and patches."""

    def __init__(self, site: MoeMlp, leading: int) -> None:
        self.site, self.leading, self.images = site, leading, 0
        weight = site.fc2.weight
        self.sums = weight.new_zeros(leading + 1, weight.shape[0], dtype=torch.float64)
        self.tokens = weight.new_zeros(leading + 1, 1, dtype=torch.float64)

    def add(self, _: nn.Module, __: object, output: torch.Tensor) -> None:
        tokens = output.reshape(self.images, -1, output.shape[-1]).double()
        each, patches = tokens[:, : self.leading], tokens[:, self.leading :]
        self.sums += torch.cat([each.sum(0), patches.sum((0, 1))[None]])
        self.tokens[: self.leading] += self.images
        self.tokens[self.leading :] += patches.shape[:2].numel()

    def means(self) -> torch.Tensor:
        return (self.sums / self.tokens.clamp_min(1)).float()


def _routed(model: nn.Module, layer: int) -> MoeMlp:
    known = moe_layers(model)
    if layer not in known:
        raise MoeeError(
            f"a layer among {', '.join(map(str, known)) or 'none'} (those with experts)",
            f"layer {layer}", "layers are counted from 0; a layer left dense has no experts",
        )  # fmt: skip
    return known[layer]
