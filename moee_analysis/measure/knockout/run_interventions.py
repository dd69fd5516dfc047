"""Many knock-outs of the same images, each of which runs only what it can change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.measure.knockout.intervention import Rule, at_random, knocked_out, per_image
from moee_analysis.models.partial_forward import Block, block_of, seeing_inputs, starting_at
from moee_analysis.moe.layer import moe_layers, moe_names
from moee_analysis.utils.progress import progress


@dataclass(frozen=True)
class Outcomes:
    """What a layer's knock-outs made of some images.

    Attributes
    ----------
    layer
        Index of the layer, counted from 0.
    knocked_out
        float32 (rules, images): share of an image's tokens that were knocked out.
    intact
        What was looked at without a knock-out, (images, ...).
    seen
        The same under each rule, (rules, images, ...).
    """

    layer: int
    knocked_out: torch.Tensor
    intact: torch.Tensor
    seen: torch.Tensor


def interventions(
    model: nn.Module,
    x: torch.Tensor,
    rules: Mapping[int, Sequence[Rule]],
    constants: Mapping[int, torch.Tensor],
    look: Callable[[torch.Tensor], torch.Tensor],
    *,
    size: int | None = None,
) -> Iterator[Outcomes]:
    """Yield the outcomes of every layer's knock-outs on the images ``x``, layer by layer.

    A knock-out changes nothing before its layer, and nothing of an image without such tokens. So
    the images run once as they are, and each knock-out runs the rest of the network with what
    entered the layer's block, on the images that it touches.

    Parameters
    ----------
    rules
        By layer index; each sees every batch of images once, in the order of the batches.
    constants
        As ``mean_outputs`` returns them.
    look
        Runs ``model`` on some images and returns what is of interest, (images, ...).
    size
        Images of one run, of whatever knock-outs of a layer; None: what fits the model.
    """
    size = fitting_batch(model, size)
    names = moe_names(model)
    blocks = {layer: block_of(model, names[layer]) for layer in rules}
    known = [block for block in blocks.values() if block is not None]
    with _choices(model, rules, images=len(x)) as chosen, seeing_inputs(known) as entering:
        intact = look(x)
    for layer, of_layer in rules.items():
        masks = torch.stack([rule(chosen[layer]) for rule in of_layer])
        start = _Start(x, blocks[layer], entering.get(blocks[layer]))
        seen = intact.repeat(len(of_layer), *(1 for _ in intact.shape))
        rows, images = masks.any(dim=2).nonzero(as_tuple=True)
        for part in torch.arange(len(rows)).split(size):
            row, image = rows[part], images[part]
            given = partial(_given, masks[row, image])
            with knocked_out(model, layer, given, constants[layer]), start.at(image):
                seen[row.to(seen.device), image.to(seen.device)] = look(x[image])
        yield Outcomes(layer, masks.float().mean(dim=2), intact, seen)


def with_controls(
    rules: Mapping[tuple[int, ...], Rule], *, leading: int, draws: int, seed: int
) -> list[Rule]:
    """Every rule followed by its controls: so many draws of as many tokens.

    The numbers that stand for a rule are part of the seed of its controls.
    """
    return [
        each
        for key, rule in rules.items()
        for each in (rule, *(_control(rule, leading, [seed, *key, d]) for d in range(draws)))
    ]


def _control(rule: Rule, leading: int, seed: list[int]) -> Rule:
    return at_random(rule, leading=leading, seed=seed)


def averaged(values: np.ndarray, draws: int) -> np.ndarray:
    """Values (rules, ...) of :func:`with_controls` as (rules, 2, ...): own, and mean control."""
    each = values.reshape(-1, 1 + draws, *values.shape[1:])
    return np.stack([each[:, 0], each[:, 1:].mean(axis=1)], axis=1)


def batches_of(
    model: nn.Module, images: ImageSet, batch_size: int | None, *, label: str
) -> Iterator[torch.Tensor]:
    """Yield the images in batches where the model is; ``label`` is what a progress bar says."""
    size, like = fitting_batch(model, batch_size), next(model.parameters())
    total = math.ceil(len(images) / size)
    for x in progress(images.batches(model, batch_size=size), label=label, total=total):
        yield x.to(like)


@dataclass(frozen=True)
class _Start:
    """Where the runs of some images start: their pixels, a block, and what enters it."""

    x: torch.Tensor
    block: Block | None
    entering: torch.Tensor | None

    def at(self, images: torch.Tensor) -> object:
        whole = self.entering is None or len(self.entering) != len(self.x)
        return starting_at(self.block, None if whole else self.entering[images])


def _given(mask: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    """Rule that knocks out the tokens of ``mask``, whatever their experts."""
    return mask


@contextmanager
def _choices(
    model: nn.Module, layers: Mapping[int, object], *, images: int
) -> Iterator[dict[int, torch.Tensor]]:
    """While open, every run leaves the experts (images, tokens) of the ``layers`` in a dict."""
    found: dict[int, torch.Tensor] = {}
    known = moe_layers(model)
    with ExitStack() as hooks:
        for layer in layers:

            def see(_: nn.Module, __: object, chosen: torch.Tensor, layer: int = layer) -> None:
                found[layer] = per_image(chosen, images)

            hooks.callback(known[layer].router.register_forward_hook(see).remove)
        yield found
