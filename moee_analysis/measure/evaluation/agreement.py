"""How close models stay to the dense model, without labels: for networks of any head or none."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.models.class_names import is_classifier
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.inputs import like
from moee_analysis.utils.progress import progress


def agreement(
    models: nn.Module | Mapping[str, nn.Module],
    images: ImageSet,
    *,
    reference: nn.Module,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """Compare the outputs of models with those of the ``reference``; labels are not used.

    Parameters
    ----------
    models
        A model, or models by the name of their system.
    reference
        The dense model, by whose transform the images are prepared.

    Returns
    -------
    DataFrame
        ``system``, ``agreement`` (share of images with the reference's prediction) and ``kl`` (mean
        KL(reference || model) in nats), both empty where the outputs are no scores of classes;
        ``cosine`` (mean over images, of the outputs), ``error`` (root of the summed squares of the
        differences, as a share of the reference's outputs), ``n_images``.

    Raises
    ------
    MoeeError
        No images or models, or one whose outputs are of another shape.
    """
    systems = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not len(images) or not systems:
        raise MoeeError("a model and an image at least", "none", "choose others")
    size = fitting_batch(reference, batch_size)
    batches = images.batches(reference, batch_size=size)
    total = math.ceil(len(images) / size)
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for x in progress(batches, label="agreement", total=total):
        wanted = _outputs(reference, x)
        for name, model in systems.items():
            parts[name].append(_compared(name, _outputs(model, x), wanted))
    scores = is_classifier(reference)
    return pd.DataFrame([_row(name, sums, scores=scores) for name, sums in parts.items()])


def _outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs of a batch, (images, numbers), float64."""
    with evaluating(model):
        return model(like(x, model)).reshape(len(x), -1).double().cpu()


def _compared(name: str, found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Sums over the images of a batch."""
    if found.shape != wanted.shape:
        raise MoeeError(
            f"outputs of shape {tuple(wanted.shape)}, as of the reference",
            f"{tuple(found.shape)} of '{name}'", "compare models that were made from one",
        )  # fmt: skip
    own, other = log_softmax(wanted, 1), log_softmax(found, 1)
    return {
        "agreement": float((found.argmax(1) == wanted.argmax(1)).sum()),
        "kl": float(kl_div(other, own, log_target=True, reduction="sum")),
        "cosine": float(cosine_similarity(found, wanted).sum()),
        "squares": float((found - wanted).square().sum()),
        "wanted": float(wanted.square().sum()),
        "images": len(found),
    }


def _row(name: str, parts: list[dict[str, float]], *, scores: bool) -> dict[str, float | str]:
    sums = {key: math.fsum(part[key] for part in parts) for key in parts[0]}
    count = int(sums["images"])
    return {
        "system": name,
        "agreement": sums["agreement"] / count if scores else math.nan,
        "kl": sums["kl"] / count if scores else math.nan,
        "cosine": sums["cosine"] / count,
        "error": math.sqrt(sums["squares"] / sums["wanted"]) if sums["wanted"] else math.nan,
        "n_images": count,
    }
