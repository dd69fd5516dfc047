"""What an expert does, causally: what a model gets wrong once the expert's tokens are lost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.evaluation.accuracy import image_scores
from moee_analysis.measure.knockout.intervention import Rule, alone, mean_outputs, removed
from moee_analysis.measure.knockout.run_interventions import (
    averaged,
    batches_of,
    interventions,
    with_controls,
)
from moee_analysis.measure.routing.resolve import chosen_layers, families_of
from moee_analysis.measure.routing.routes import model_of
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import class_labels
from moee_analysis.moe.layer import moe_layers
from moee_analysis.utils.checks import draw_numbers

WHAT = {"removed": removed, "alone": alone}
"""What is done with an expert: it is knocked out, or all others are."""

SYSTEMS = ("expert", "random tokens")
"""Whose tokens are knocked out: the experts', or as many of every image drawn at random."""


def knock_out(
    run: Extraction | nn.Module,
    images: ImageSet,
    calibration: ImageSet,
    *,
    layers: Sequence[int] = (),
    reference: nn.Module | None = None,
    families: Mapping[str, str] | None = None,
    controls: int = 1,
    resamples: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What each expert is worth to all images, to every class and to every family of classes.

    In one layer at a time the tokens of one expert (``removed``), or of all others (``alone``), get
    the layer's mean output over the calibration images (``intervention``).
    Beside each stands its control: as many tokens of every image, the same leading ones and
    patches drawn at random. Where only the class token is read (the last layer of most ViTs) the
    two are therefore the same.

    Parameters
    ----------
    run
        A run, or a routed model, with one expert per token.
    images
        Images to look at, none of them of ``calibration``.
    calibration
        Images over which the mean outputs are taken; a few hundred are enough.
    layers
        Layers counted from 0; empty: all with experts.
    reference
        The dense model; None leaves ``top1_dense`` empty.
    families
        Family of each class by its readable name; adds rows and a column.
    controls
        Random draws of each control, over which it is averaged.
    resamples, seed
        Of the images, for the intervals.

    Returns
    -------
    DataFrame
        ``layer``, ``expert``, ``what`` (removed | alone), ``system`` (expert | random tokens),
        ``kind`` (all | class | family), ``group`` (its name, with the index where classes share
        one), ``family`` (of a class; empty without ``families``), ``images`` (of the group),
        ``knocked_out`` (mean share of an image's tokens), ``top1_dense``, ``top1_intact``,
        ``top1``, ``change`` (of top-1, from intact),
        ``low``, ``high``, ``logp_change`` (of the mean log-probability of the true class, in nats),
        ``logp_low``, ``logp_high``. Intervals are 95 %, paired: both on the same resampled images;
        empty for a single image. Shares are 0 to 1.

    Raises
    ------
    MoeeError
        Images of the calibration, no images, a layer without experts or with several per token, a
        class without a family, fewer than one control or resample.
    """
    draw_numbers(seed, controls=controls, resamples=resamples)
    model = model_of(run)
    size = fitting_batch(model, batch_size)
    check_apart(calibration, images, use="used for calibration")
    shown = chosen_layers(moe_layers(model), layers)
    constants = mean_outputs(model, calibration, layers=shown)
    groups = _groups(model, images, families)
    dense = _dense_right(reference, images)
    plan = {layer: _rules(model, layer, constants[layer], controls, seed) for layer in shown}
    intact, facts = _all_facts(model, images, plan, constants, size)
    weights = {group: group.resampled(resamples, seed) for group in groups}
    tables = []
    for layer, of_layer in facts.items():
        rows = np.stack([averaged(fact, controls) for fact in of_layer])
        tables += [_table(layer, rows, intact, dense, each) for each in weights.items()]
    table = pd.concat(tables, ignore_index=True)
    table.attrs["caption"] = (
        f"Tokens knocked out get the layer's mean output over {len(calibration)} calibration "
        f"images. Control: as many tokens of each of the {len(images)} images, patches at random "
        f"(draws: {controls}). 95 % intervals: {resamples} resamples of images, seed {seed}."
    )
    return table


@dataclass(frozen=True, eq=False)
class _Group:
    """Some of the images: all, those of a class, or of a family of classes."""

    kind: str
    name: str
    family: str
    images: np.ndarray  # int64, their indices

    def resampled(self, times: int, seed: int) -> np.ndarray:
        """Weights of the group's images in resamples of them, (times, images) that sum to 1."""
        count = len(self.images)
        draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times)
        return draws / count


def _groups(model: nn.Module, images: ImageSet, families: Mapping[str, str] | None) -> list[_Group]:
    labels, names = images.labels(model), class_labels(model)
    classes = np.unique(labels)
    own = [names[c] for c in classes]
    family = [""] * len(own) if families is None else families_of(own, families)
    of_image = np.array(family)[np.searchsorted(classes, labels)]
    unlike = [f"{n} ({c})" if own.count(n) > 1 else n for n, c in zip(own, classes, strict=True)]
    return [
        _Group("all", "all", "", np.arange(len(labels))),
        *(
            _Group("class", name, kin, np.flatnonzero(labels == c))
            for c, name, kin in zip(classes, unlike, family, strict=True)
        ),
        *(
            _Group("family", name, name, np.flatnonzero(of_image == name))
            for name in dict.fromkeys(family)
            if name
        ),
    ]


def _dense_right(reference: nn.Module | None, images: ImageSet) -> np.ndarray:
    """Whether the dense model is right, float (images,); nan where there is none."""
    if reference is None:
        return np.full(len(images), math.nan)
    return image_scores({"dense": reference}, images)["dense"]["right"].astype(float)


def _rules(
    model: nn.Module, layer: int, constant: torch.Tensor, controls: int, seed: int
) -> list[Rule]:
    """Every knock-out of a layer, each followed by its controls."""
    experts = range(moe_layers(model)[layer].n_experts)
    rules = {
        (layer, expert, place): what(expert)
        for expert, (place, what) in product(experts, enumerate(WHAT.values()))
    }
    return with_controls(rules, leading=len(constant) - 1, draws=controls, seed=seed)


def _all_facts(
    model: nn.Module,
    images: ImageSet,
    plan: Mapping[int, Sequence[Rule]],
    constants: Mapping[int, torch.Tensor],
    size: int,
) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """Facts of every image, intact (3, images) and by layer (3, rules, images).

    Facts are the share of tokens knocked out, whether the model is right, and the log-probability
    of the true class.
    """
    intact, facts, done = [], {layer: [] for layer in plan}, 0
    labels = torch.from_numpy(images.labels(model)).to(next(model.parameters()).device)
    with evaluating(model):
        for x in batches_of(model, images, size, label="knock-outs"):
            truth = labels[done : done + len(x)]
            for one in interventions(model, x, plan, constants, model, size=size):
                facts[one.layer].append(_judged(one.knocked_out, one.seen, truth))
            none = torch.zeros_like(one.knocked_out[:1])
            intact.append(_judged(none, one.intact[None], truth)[:, 0])
            done += len(x)
    whole = {layer: np.concatenate(parts, axis=2) for layer, parts in facts.items()}
    return np.concatenate(intact, axis=1), whole


def _judged(share: torch.Tensor, logits: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Facts (3, rules, images) from logits (rules, images, classes)."""
    right = logits.argmax(dim=2) == truth
    where = truth.expand(len(logits), -1)[..., None]
    logp = logits.float().log_softmax(dim=2).gather(2, where)[..., 0]
    return torch.stack([share, right.to(share), logp.to(share)]).double().cpu().numpy()


def _table(
    layer: int,
    facts: np.ndarray,
    intact: np.ndarray,
    dense: np.ndarray,
    drawn: tuple[_Group, np.ndarray],
) -> pd.DataFrame:
    """Rows of one layer and one group, from facts (3, knock-outs, systems, images)."""
    group, weights = drawn
    experts, own = facts.shape[1] // len(WHAT), group.images
    share, right, logp = facts.reshape(3, -1, facts.shape[-1])[..., own]
    change, drop = right - intact[1, own], logp - intact[2, own]
    low, high = _interval(change, weights)
    logp_low, logp_high = _interval(drop, weights)
    keys = pd.MultiIndex.from_product(
        [range(experts), WHAT, SYSTEMS], names=["expert", "what", "system"]
    )
    table = keys.to_frame(index=False)
    table.insert(0, "layer", layer)
    return table.assign(
        kind=group.kind,
        group=group.name,
        family=group.family,
        images=len(own),
        knocked_out=share.mean(axis=1),
        top1_dense=dense[own].mean(),
        top1_intact=intact[1, own].mean(),
        top1=right.mean(axis=1),
        change=change.mean(axis=1),
        low=low,
        high=high,
        logp_change=drop.mean(axis=1),
        logp_low=logp_low,
        logp_high=logp_high,
    )


def _interval(values: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % bootstrap intervals of the means of ``values`` (rows, images)."""
    if values.shape[1] < 2:  # a single image cannot be resampled
        return (np.full(len(values), math.nan),) * 2
    low, high = np.quantile(weights @ values.T, (0.025, 0.975), axis=0)
    return low, high
