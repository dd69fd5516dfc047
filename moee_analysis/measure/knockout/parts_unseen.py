"""Which parts of a scene are no longer seen once an expert is knocked out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.knockout.intervention import Rule, mean_outputs, removed
from moee_analysis.measure.knockout.part_probe import PartProbe, Place
from moee_analysis.measure.knockout.run_interventions import (
    Outcomes,
    averaged,
    batches_of,
    interventions,
    with_controls,
)
from moee_analysis.measure.routing.part_alignment import check_masks
from moee_analysis.measure.routing.resolve import chosen_layers
from moee_analysis.measure.routing.routes import model_of
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.moe.layer import moe_layers
from moee_analysis.utils.checks import draw_numbers

SYSTEMS = ("expert", "random patches")
"""What is knocked out: an expert, or as many patches of every image drawn at random."""


def parts_unseen(
    run: Extraction | nn.Module,
    images: ImageSet,
    calibration: ImageSet,
    *,
    layers: Sequence[int] = (),
    controls: int = 1,
    least: int = 20,
    resamples: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the part of a patch can still be read from its token, per expert knocked out.

    A linear probe learns on the calibration scenes, with the model intact, to tell the part that
    covers most of a patch from the token that enters the last block: in a ViT this is the last
    place where the class token reads the patches, and it is the same place for all layers. There
    the probe is asked again, with an expert of an earlier layer knocked out as in
    ``knock_out``. What later layers mend is not missed.

    Parameters
    ----------
    run
        A run, or a routed model, with one expert per token.
    images
        Images with part masks, none of them of ``calibration``. The model's transform must not
        crop them.
    calibration
        Images with part masks: for the mean outputs and for the probe.
    layers
        Layers counted from 0; empty: all with experts before the last block.
    controls
        Random draws of each control, over which it is averaged.
    least
        Parts that fewer patches of ``images`` show are left out.
    resamples, seed
        Of the images, for the intervals.

    Returns
    -------
    DataFrame
        ``layer``, ``expert``, ``system`` (expert | random patches), ``part``, ``patches`` (that
        show it), ``knocked_out`` (mean share of an image's tokens), ``recall_intact`` (share of
        these patches that the probe names rightly, 0 to 1), ``recall``, ``change``, ``low``,
        ``high`` (95 % bootstrap interval over images, paired).

    Raises
    ------
    MoeeError
        Images without part masks or of the calibration, a layer without experts or in the last
        block, no part that is shown often enough, fewer than one control or resample.
    """
    draw_numbers(seed, controls=controls, resamples=resamples)
    model = model_of(run)
    size = fitting_batch(model, batch_size)
    check_masks(images)
    check_masks(calibration)
    check_apart(calibration, images, use="used for calibration")
    place = Place.of(model)
    shown = chosen_layers(place.layers_before(), layers)
    constants = mean_outputs(model, calibration, layers=shown)
    probe = PartProbe.trained(place, calibration, size)
    plan = {}
    for layer in shown:
        experts, leading = range(moe_layers(model)[layer].n_experts), len(constants[layer]) - 1
        rules = {(layer, expert): removed(expert) for expert in experts}
        plan[layer] = with_controls(rules, leading=leading, draws=controls, seed=seed)
    counts = _all_counts(probe, images, plan, constants, size)
    parts = _shown_parts(place.parts(images), images.parts, least)
    even = np.full(len(images), 1 / len(images))
    draws = np.random.default_rng(seed).multinomial(len(images), even, resamples).astype(float)
    table = pd.concat(
        [_table(layer, each, parts, (draws, controls)) for layer, each in counts.items()],
        ignore_index=True,
    )
    table.attrs["caption"] = (
        f"Linear probe of the tokens that enter the last block, trained on {len(calibration)} "
        f"calibration scenes, every part with the same weight; {len(images)} scenes, parts of at "
        f"least {least} patches. Control: as many random patches of each image."
    )
    return table


@dataclass(frozen=True)
class _Counts:
    """What the probe named rightly: by rule, image and part.

    ``shown`` (images, parts) patches show a part; of these ``intact`` (images, parts) are named
    rightly by the model as it is, and ``named`` (rules, images, parts) under each rule, which
    knocks out ``share`` (rules, images) of the tokens.
    """

    shown: np.ndarray
    intact: np.ndarray
    named: np.ndarray
    share: np.ndarray

    @classmethod
    def of(cls, one: Outcomes, truth: np.ndarray, parts: int) -> _Counts:
        """Count what an intervention made of some images; ``truth`` (images, n) are their parts."""
        shown = np.eye(parts)[truth]  # (images, n, parts)
        named = np.einsum("rin,inp->rip", one.seen.numpy() == truth, shown)
        intact = np.einsum("in,inp->ip", one.intact.numpy() == truth, shown)
        return cls(shown.sum(axis=1), intact, named, one.knocked_out.cpu().numpy())

    @classmethod
    def joined(cls, several: list[_Counts]) -> _Counts:
        """Put the images of several batches in one."""
        axes = {"shown": 0, "intact": 0, "named": 1, "share": 1}
        return cls(
            **{
                k: np.concatenate([getattr(s, k) for s in several], axis)
                for k, axis in axes.items()
            }
        )


def _all_counts(
    probe: PartProbe,
    images: ImageSet,
    plan: Mapping[int, Sequence[Rule]],
    constants: Mapping[int, torch.Tensor],
    size: int,
) -> dict[int, _Counts]:
    """Count by layer what the probe names rightly under each rule."""
    model, truth = probe.place.model, probe.place.parts(images)
    counts: dict[int, list[_Counts]] = {layer: [] for layer in plan}
    done = 0
    with evaluating(model):
        for x in batches_of(model, images, size, label="knock-outs"):
            own = truth[done : done + len(x)]
            for one in interventions(model, x, plan, constants, probe, size=size):
                counts[one.layer].append(_Counts.of(one, own, len(images.parts)))
            done += len(x)
    return {layer: _Counts.joined(parts) for layer, parts in counts.items()}


def _table(
    layer: int, counts: _Counts, parts: Mapping[int, str], plan: tuple[np.ndarray, int]
) -> pd.DataFrame:
    """Rows of one layer; ``plan`` is how often each image is redrawn, and the number of controls.

    The former is (resamples, images).
    """
    draws, controls = plan
    kept = list(parts)
    shown, intact = counts.shown[:, kept], counts.intact[:, kept]
    named = averaged(counts.named[..., kept], controls)  # (experts, systems, images, parts)
    total, before = shown.sum(axis=0), intact.sum(axis=0) / shown.sum(axis=0)
    recall = named.sum(axis=2) / total
    low, high = _interval(named - intact, shown, draws)
    keys = [range(len(named)), SYSTEMS, parts.values()]
    index = pd.MultiIndex.from_product(keys, names=["expert", "system", "part"])
    table = index.to_frame(index=False)
    table.insert(0, "layer", layer)
    return table.assign(
        patches=np.broadcast_to(total.astype(np.int64), recall.shape).ravel(),
        knocked_out=averaged(counts.share, controls).mean(axis=2).repeat(len(kept)),
        recall_intact=np.broadcast_to(before, recall.shape).ravel(),
        recall=recall.ravel(),
        change=(recall - before).ravel(),
        low=low.ravel(),
        high=high.ravel(),
    )


def _interval(
    more: np.ndarray, shown: np.ndarray, draws: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of the change in recall, (..., parts).

    ``more`` (..., images, parts) patches of ``shown`` (images, parts) are named rightly; a resample
    without any patch of a part says nothing of it.
    """
    with np.errstate(invalid="ignore"):
        resampled = (draws @ more) / (draws @ shown)  # (..., resamples, parts)
    low, high = np.nanquantile(resampled, (0.025, 0.975), axis=-2)
    return low, high


def _shown_parts(truth: np.ndarray, names: tuple[str, ...], least: int) -> dict[int, str]:
    """Parts that ``least`` patches or more show, by number, the most frequent first."""
    patches = np.bincount(truth.ravel(), minlength=len(names))
    frequent = [int(part) for part in np.argsort(-patches, kind="stable") if patches[part] >= least]
    if not frequent:
        raise MoeeError(
            f"a part that {least} patches show", f"at most {patches.max()}", "take more images"
        )
    return {part: names[part] for part in frequent}
