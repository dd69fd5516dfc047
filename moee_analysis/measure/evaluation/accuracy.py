"""How well models classify, with intervals, and how close they stay to the dense model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.models.class_names import knows_classes
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.utils.checks import draw_numbers
from moee_analysis.utils.progress import progress

REFERENCE = ""
"""Key of the reference's own scores; no system is called so."""


def accuracy(
    models: nn.Module | Mapping[str, nn.Module],
    images: ImageSet,
    *,
    reference: nn.Module | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Accuracy of one or several models on the same images, one row per model.

    The images are decoded once for all, and prepared by the transform of the reference, or else of
    the first model.

    Parameters
    ----------
    models
        A model, or models by the name of their system.
    reference
        The dense model, or its name among ``models``; None leaves the columns that compare
        with it empty.
    seed, resamples
        Of the image bootstrap.

    Returns
    -------
    DataFrame
        ``system``, ``top1``, ``low``, ``high`` (95 % bootstrap interval of ``top1``), ``top5``,
        ``retention`` (``top1`` / that of the reference), ``retention_low``,
        ``retention_high`` (paired bootstrap: both models on the same resampled images),
        ``agreement`` (share of images with the reference's prediction), ``kl`` (mean
        KL(reference || model) in nats), ``reference_top1``, ``n_images``. All are shares, 0 to 1.

    Raises
    ------
    MoeeError
        No images, no models, no resamples, a reference that is not among them, or a
        ``batch_size`` or ``seed`` that is none.
    """
    draw_numbers(seed, resamples=resamples)
    systems = _named(models)
    baseline = _baseline(systems, reference)
    scores = image_scores(systems, images, reference=baseline, batch_size=batch_size)
    return summarised(scores, seed=seed, resamples=resamples)


def image_scores(
    systems: Mapping[Hashable, nn.Module],
    images: ImageSet,
    *,
    reference: nn.Module | None = None,
    batch_size: int | None = None,
) -> dict[Hashable, dict[str, np.ndarray]]:
    """Scores of every image by every model, in the order of the images.

    Returns
    -------
    dict
        By system: ``right`` and ``top5``, bool (images,), and with a reference ``agreement``, bool,
        and ``kl``, float. The reference's own stand under :data:`REFERENCE`.

    Raises
    ------
    MoeeError
        No images.
    """
    if not len(images):
        raise MoeeError("at least one image", f"none in '{images.name}'", "choose other images")
    contestants = dict(systems) if reference is None else {**systems, REFERENCE: reference}
    first = next(iter(systems.values())) if reference is None else reference
    batch_size = fitting_batch(first, batch_size)
    labels = torch.from_numpy(_labels(images, [first, *systems.values()]))
    total = math.ceil(len(images) / batch_size)
    batches = progress(images.batches(first, batch_size=batch_size), label="accuracy", total=total)
    parts: dict[Hashable, list[dict[str, np.ndarray]]] = {name: [] for name in contestants}
    with ExitStack() as stack:
        for model in contestants.values():
            stack.enter_context(evaluating(model))
        for number, x in enumerate(batches):
            truth = labels[number * batch_size :][: len(x)]
            for name, scores in _score_batch(contestants, reference, x, truth).items():
                parts[name].append(scores)
    return {name: _concatenated(scores) for name, scores in parts.items()}


def _labels(images: ImageSet, models: Sequence[nn.Module]) -> np.ndarray:
    """Labels by the first of the ``models`` that names its classes."""
    named = next(filter(knows_classes, models), models[0])
    return images.labels(named)


def summarised(
    scores: Mapping[Hashable, Mapping[str, np.ndarray]], *, seed: int = 0, resamples: int = 1000
) -> pd.DataFrame:
    """Return the table of :func:`accuracy` of some :func:`image_scores`."""
    right = scores[REFERENCE]["right"] if REFERENCE in scores else None
    rows = [
        {"system": name} | _row(score, right, seed=seed, resamples=resamples)
        for name, score in scores.items()
        if name != REFERENCE
    ]
    return pd.DataFrame(rows)


def _named(models: nn.Module | Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    systems = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not systems:
        raise MoeeError("at least one model", "none", "pass a model or a mapping of models")
    return systems


def _baseline(
    systems: Mapping[str, nn.Module], reference: nn.Module | str | None
) -> nn.Module | None:
    if not isinstance(reference, str):
        return reference
    if reference not in systems:
        raise MoeeError(
            f"a reference among {', '.join(systems)}", f"'{reference}'", "name one of the models"
        )
    return systems[reference]


def _score_batch(
    contestants: Mapping[Hashable, nn.Module],
    baseline: nn.Module | None,
    x: torch.Tensor,
    truth: torch.Tensor,
) -> dict[Hashable, dict[str, np.ndarray]]:
    """Scores of the images ``x`` [B, 3, H, W]; every distinct model runs once."""
    logits = {model: _logits(model, x) for model in dict.fromkeys(contestants.values())}
    outputs = {of_model.shape[1] for of_model in logits.values()}
    if len(outputs) > 1:
        raise MoeeError(
            "models of the same classes", f"{' and '.join(map(str, sorted(outputs)))} outputs",
            "compare those that were made from one model",
        )  # fmt: skip
    own = logits.get(baseline)
    return {name: _scores(logits[model], truth, own) for name, model in contestants.items()}


def _logits(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x.to(next(model.parameters()))).float().cpu()


def _scores(
    logits: torch.Tensor, truth: torch.Tensor, own: torch.Tensor | None
) -> dict[str, np.ndarray]:
    """One number per image and score, from logits [B, classes] and the reference's ``own``."""
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == truth[:, None]
    scores = {"right": hits[:, 0], "top5": hits.any(1)}
    if own is not None:
        scores["agreement"] = best[:, 0] == own.argmax(1)
        scores["kl"] = _kl(own, logits)
    return {name: values.numpy() for name, values in scores.items()}


def _kl(reference: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(reference || model) of the softmaxed logits of each image, in nats."""
    own, other = log_softmax(reference, 1), log_softmax(logits, 1)
    return kl_div(other, own, log_target=True, reduction="none").sum(1)


def _concatenated(scores: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in scores]) for name in scores[0]}


def _row(
    scores: dict[str, np.ndarray], own: np.ndarray | None, *, seed: int, resamples: int
) -> dict[str, float]:
    right = scores["right"]
    draws, own_draws = _bootstrap(right, right if own is None else own, seed, resamples)
    low, high = _interval(draws)
    row = {"top1": right.mean(), "low": low, "high": high, "top5": scores["top5"].mean()}
    row |= _against_reference(scores, own, draws, own_draws)
    return row | {"n_images": len(right)}


def _against_reference(
    scores: dict[str, np.ndarray], own: np.ndarray | None, draws: np.ndarray, own_draws: np.ndarray
) -> dict[str, float]:
    columns = ("retention", "retention_low", "retention_high", "agreement", "kl", "reference_top1")
    if own is None:
        return dict.fromkeys(columns, math.nan)
    low, high = _interval(_ratio(draws, own_draws))
    retention = float(_ratio(scores["right"].mean(), own.mean()))
    agreement, kl = scores["agreement"].mean(), scores["kl"].mean()
    return dict(zip(columns, (retention, low, high, agreement, kl, own.mean()), strict=True))


def _bootstrap(
    right: np.ndarray, own: np.ndarray, seed: int, resamples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 of the model and of the reference on resampled images, each (resamples,).

    Only which of the two is right matters, so resampling the images is the same as drawing the
    sizes of the four groups from a multinomial.
    """
    groups = np.bincount(2 * right + own, minlength=4)
    sizes = np.random.default_rng(seed).multinomial(len(right), groups / len(right), size=resamples)
    shares = sizes / len(right)
    return shares[:, 2] + shares[:, 3], shares[:, 1] + shares[:, 3]


def _ratio(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """``top / bottom``, and nan where the reference is never right."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(bottom > 0, np.divide(top, bottom), math.nan)


def _interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of ``draws``, of which those that are nan say nothing."""
    known = draws[~np.isnan(draws)]
    if not len(known):
        return math.nan, math.nan
    low, high = np.quantile(known, [0.025, 0.975])
    return float(low), float(high)
