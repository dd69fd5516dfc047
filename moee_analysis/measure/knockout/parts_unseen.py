"""Which parts of a scene are no longer seen once an expert is knocked out."""

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.tokens import kinds_seen
from moee_analysis.measure.knockout.intervention import Look, Plan, knock_out_all, removed
from moee_analysis.measure.routing.bootstrap import MIDDLE, redraw_counts
from moee_analysis.measure.routing.inputs import Layers, Run, batches_of, choose_layers, model_of
from moee_analysis.measure.routing.part_alignment import all_patch_parts, check_masks
from moee_analysis.measure.routing.tables import add_caption, all_rows, stack
from moee_analysis.models.capture import capture, evaluating
from moee_analysis.models.inputs import blank
from moee_analysis.models.merging import Tokens
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import all_mlps, moe_layers, moe_names
from moee_analysis.utils.checks import draw_numbers

SYSTEMS = ("expert", "random patches")  # as many of every image, drawn at random


def parts_unseen(
    run: Run,
    images: ImageSet,
    calibration: ImageSet,
    *,
    layers: Layers = (),
    least: int = 20,
    resamples: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """How well the part of a patch can still be read from its token, per expert knocked out.

    A linear probe learns on the calibration scenes, with the model intact, to tell the part that
    covers most of a patch from the token that enters the last block: in a ViT the last place where
    the class token reads the patches. There the probe is asked again, with an expert of an earlier
    layer knocked out as in ``knock_out``; what later layers mend is not missed. Parts that fewer
    than ``least`` patches show are left out. The model's transform must not crop the images.

    Columns: ``layer``, ``expert``, ``system`` (expert | random patches), ``part``, ``patches``
    (that show it), ``knocked_out`` (mean share of an image's tokens), ``recall_intact`` (share of
    these patches that the probe names rightly), ``recall``, ``change``, ``low``, ``high`` (95 %
    bootstrap interval over images, paired).
    Raises MoeeError: images without part masks or of the calibration, a layer without experts or in
    the last block, no part that is shown often enough, no resamples.
    """
    draw_numbers(seed, resamples=resamples)
    model = model_of(run)
    size = fitting_batch(model, batch_size)
    check_masks(images)
    check_masks(calibration)
    check_disjoint(calibration, images, use="used for calibration")
    place, routed = Place(model), moe_layers(model)
    rules = {
        layer: {(layer, expert): removed(expert) for expert in range(routed[layer].n_experts)}
        for layer in choose_layers(place.layers_before(), layers)
    }
    plan = Plan.of(model, calibration, rules, seed=seed)
    look = _train_probe(place, calibration, size)
    truth = all_patch_parts(images, place.order.shape)
    shows = np.eye(len(images.parts))[truth]  # (images, patches, parts)

    def judge(named: torch.Tensor, some: slice) -> np.ndarray:
        """Patches of each part that the probe names rightly: (rules, images, parts)."""
        return np.einsum("rin,inp->rip", named.numpy() == truth[some], shows[some])

    intact, found = knock_out_all(model, images, plan, look, judge, size=size)
    chosen = _choose_frequent(truth, len(images.parts), least)
    draws = redraw_counts(len(images), resamples, seed=seed).astype(float)
    counts = shows.sum(axis=1)[:, chosen], intact[:, chosen]
    facts = {layer: (share, named[..., chosen]) for layer, (share, named) in found.items()}
    parts = [(layer, _describe_layer(*each, counts, draws)) for layer, each in facts.items()]
    table = stack(parts, by=["layer"])
    table["part"] = table["part"].map(dict(enumerate(images.parts[part] for part in chosen)))
    return add_caption(
        table,
        f"Linear probe of the tokens that enter the last block, trained on {len(calibration)} "
        f"calibration scenes, every part with the same weight; {len(images)} scenes, parts of at "
        f"least {least} patches. Control: as many random patches of each image.",
    )


class Place:
    """The input of a model's last block, where tokens are read, and how they lie in the image.

    ``mlp`` names its MLP, ``leading`` tokens are no patches, and ``order`` (rows, columns) has the
    number of the patch token at each place of the image.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.mlp = model, list(all_mlps(model))[-1]
        self.block = self.mlp.rpartition(".")[0]
        with evaluating(model):
            grid = self.entering(blank(model)).shape[1:-1]
        self.leading = len(kinds_seen(model, grid))
        self.order = patch_places(model, self.mlp, (1, *grid), leading=self.leading)

    def layers_before(self) -> list[int]:
        """Indices of the routed layers that come before the block; a MoeeError: there are none."""
        names, block = moe_names(self.model), f"{self.block}."
        before = [layer for layer, name in names.items() if not name.startswith(block)]
        if not before:
            hint = "extract experts of earlier layers"
            raise MoeeError("experts in a layer before the last block", "none", hint)
        return before

    def entering(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model on ``x`` and return what enters the block, channels last."""
        with capture(self.model, [self.block]) as found:
            self.model(x)
        channels = self.model.get_submodule(self.mlp).fc1.in_features
        tokens = found[self.block]
        if isinstance(tokens, Tokens):
            tokens = tokens.of_patches
        return tokens if tokens.shape[-1] == channels else tokens.movedim(1, -1)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the images ``x`` that enter the block, row by row: (images, n, dim)."""
        tokens = self.entering(x).flatten(1, -2)
        return tokens[:, self.leading + torch.from_numpy(self.order.ravel())]


def _train_probe(place: Place, images: ImageSet, batch_size: int | None) -> Look:
    """Train what names the part of every patch of images, int64 (images, patches)."""
    from sklearn.linear_model import RidgeClassifier

    batches = batches_of(place.model, images, batch_size, label="tokens for the probe")
    with evaluating(place.model):
        tokens = np.concatenate([_flatten(place.patches(x)) for x in batches])
    truth = all_patch_parts(images, place.order.shape)
    probe = RidgeClassifier(class_weight="balanced").fit(tokens, truth.ravel())

    def look(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(probe.predict(_flatten(place.patches(x)))).reshape(len(x), -1)

    return look


def _flatten(patches: torch.Tensor) -> np.ndarray:
    return patches.flatten(0, 1).float().cpu().numpy()


def _describe_layer(
    share: np.ndarray, named: np.ndarray, counts: tuple[np.ndarray, np.ndarray], draws: np.ndarray
) -> pd.DataFrame:
    """Rows of one layer, parts by number.

    ``share`` (rules, images) of the tokens are knocked out and ``named`` (rules, images, parts)
    patches named rightly, by experts and their controls in turn; ``counts`` are the patches that
    show a part, and those named rightly by the intact model, (images, parts).
    """
    shown, intact = counts
    total, before = shown.sum(axis=0), intact.sum(axis=0) / shown.sum(axis=0)
    recall = named.sum(axis=1) / total
    with np.errstate(invalid="ignore"):  # a resample without any patch of a part says nothing of it
        resampled = (draws @ (named - intact)) / (draws @ shown)  # (rules, resamples, parts)
    low, high = np.nanquantile(resampled, MIDDLE, axis=-2)
    rows = all_rows(expert=range(len(named) // 2), system=SYSTEMS, part=range(len(total)))
    rows["patches"] = total.astype(np.int64)[rows["part"]]
    rows["knocked_out"] = share.mean(axis=1).repeat(len(total))
    rows["recall_intact"], rows["recall"] = before[rows["part"]], recall.ravel()
    return rows.assign(change=(recall - before).ravel(), low=low.ravel(), high=high.ravel())


def _choose_frequent(truth: np.ndarray, parts: int, least: int) -> list[int]:
    """Numbers of the parts that ``least`` patches or more show, the most frequent first."""
    patches = np.bincount(truth.ravel(), minlength=parts)
    frequent = [int(part) for part in np.argsort(-patches, kind="stable") if patches[part] >= least]
    if not frequent:
        found = f"at most {patches.max()}"
        raise MoeeError(f"a part that {least} patches show", found, "take more images")
    return frequent
