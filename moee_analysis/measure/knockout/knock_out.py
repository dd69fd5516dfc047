"""What an expert does, causally: what a model gets wrong once the expert's tokens are lost."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import score_images
from moee_analysis.measure.knockout.intervention import (
    Plan,
    alone,
    average,
    measure_knock_outs,
    removed,
)
from moee_analysis.measure.routing.bootstrap import MIDDLE, redraw_counts
from moee_analysis.measure.routing.resolve import choose_layers, families_of, model_of
from moee_analysis.measure.routing.tables import add_caption, all_rows
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
    the layer's mean output over the ``calibration`` images, a few hundred of them
    (``intervention``). Beside each stands its control: as many tokens of every image, the same
    leading ones and patches drawn at random, averaged over ``controls`` draws. Where only the class
    token is read (the last layer of most ViTs) the two are therefore the same. ``reference`` is the
    dense model; ``families`` of the classes, by readable name, add rows and a column.

    Columns: ``layer``, ``expert``, ``what`` (removed | alone), ``system`` (expert | random tokens),
    ``kind`` (all | class | family), ``group`` (its name, with the index where classes share
    one), ``family`` (of a class; empty without ``families``), ``images`` (of the group),
    ``knocked_out`` (mean share of an image's tokens), ``top1_dense`` (nan without ``reference``),
    ``top1_intact``, ``top1``, ``change`` (of top-1, from intact), ``low``, ``high``,
    ``logp_change`` (of the mean log-probability of the true class, in nats), ``logp_low``,
    ``logp_high``. Intervals are 95 %, paired: both on the same resampled images; empty for a single
    image. Shares are 0 to 1.
    Raises MoeeError: images of the calibration, no images, a layer without experts or with several
    per token, a class without a family, fewer than one control or resample.
    """
    draw_numbers(seed, controls=controls, resamples=resamples)
    model = model_of(run)
    size = fitting_batch(model, batch_size)
    check_disjoint(calibration, images, use="used for calibration")
    routed = moe_layers(model)
    rules = {
        layer: {
            (layer, expert, place): what(expert)
            for expert in range(routed[layer].n_experts)
            for place, what in enumerate(WHAT.values())
        }
        for layer in choose_layers(routed, layers)
    }
    plan = Plan.of(model, calibration, rules, controls=controls, seed=seed)
    groups = _groups(model, images, families)
    right = np.full(len(images), math.nan)
    if reference is not None:
        right = score_images({"dense": reference}, images)["dense"]["right"].astype(float)
    truth = torch.from_numpy(images.labels(model)).to(next(model.parameters()).device)
    intact, found = measure_knock_outs(
        model, images, plan, lambda logits, place: _judge(logits, truth[place]), size=size
    )
    averages = {
        layer: tuple(np.concatenate(average(each.astype(float), controls)) for each in of_layer)
        for layer, of_layer in found.items()
    }
    weights = [redraw_counts(len(g.images), resamples, seed=seed) / len(g.images) for g in groups]
    tables = [
        _table(group, own, facts, (intact, right)).assign(layer=layer)
        for layer, facts in averages.items()
        for group, own in zip(groups, weights, strict=True)
    ]
    table = pd.concat(tables, ignore_index=True)
    table.insert(0, "layer", table.pop("layer"))
    return add_caption(
        table,
        f"Tokens knocked out get the layer's mean output over {len(calibration)} calibration "
        f"images. Control: as many tokens of each of the {len(images)} images, patches at random "
        f"(draws: {controls}). 95 % intervals: {resamples} resamples of images, seed {seed}.",
    )


@dataclass(frozen=True, eq=False)
class _Group:
    """Some of the images: all, those of a class, or of a family of classes."""

    kind: str
    name: str
    family: str
    images: np.ndarray  # int64, their indices


def _groups(model: nn.Module, images: ImageSet, families: Mapping[str, str] | None) -> list[_Group]:
    labels, names = images.labels(model), class_labels(model)
    classes = np.unique(labels)
    own = [names[c] for c in classes]
    family = [""] * len(own) if families is None else families_of(own, families)
    of_image = np.array(family)[np.searchsorted(classes, labels)]
    groups = [_Group("all", "all", "", np.arange(len(labels)))]
    for c, name, kin in zip(classes, own, family, strict=True):
        unlike = f"{name} ({c})" if own.count(name) > 1 else name
        groups.append(_Group("class", unlike, kin, np.flatnonzero(labels == c)))
    kins = filter(None, dict.fromkeys(family))
    return groups + [_Group("family", k, k, np.flatnonzero(of_image == k)) for k in kins]


def _judge(logits: torch.Tensor, truth: torch.Tensor) -> np.ndarray:
    """Whether the model is right, and the log-probability of the true class: (rules, images, 2)."""
    right = logits.argmax(dim=2) == truth
    where = truth.expand(len(logits), -1)[..., None]
    logp = logits.float().log_softmax(dim=2).gather(2, where)[..., 0]
    return torch.stack([right.to(logp), logp], dim=2).double().cpu().numpy()


def _table(
    group: _Group,
    weights: np.ndarray,
    found: tuple[np.ndarray, np.ndarray],
    unchanged: tuple[np.ndarray, np.ndarray],
) -> pd.DataFrame:
    """Rows of one layer and one group; ``unchanged`` are intact facts, and the dense model's."""
    own, (intact, dense) = group.images, unchanged
    share, facts = found
    right, logp = (np.ascontiguousarray(facts[:, own, fact]) for fact in (0, 1))
    change, drop = right - intact[own, 0], logp - intact[own, 1]
    low, high = _interval(change, weights)
    logp_low, logp_high = _interval(drop, weights)
    rows = all_rows(expert=range(len(right) // 4), what=WHAT, system=SYSTEMS)
    return rows.assign(
        kind=group.kind,
        group=group.name,
        family=group.family,
        images=len(own),
        knocked_out=share[:, own].mean(axis=1),
        top1_dense=dense[own].mean(),
        top1_intact=intact[own, 0].mean(),
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
    low, high = np.quantile(weights @ values.T, MIDDLE, axis=0)
    return low, high
