"""How well models classify, with intervals, and how close they stay to the dense model."""

import math
from collections.abc import Hashable, Iterable, Mapping

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.bootstrap import MIDDLE
from moee_analysis.measure.routing.inputs import check_any, decode_batches
from moee_analysis.models.capture import evaluating
from moee_analysis.models.class_names import is_classifier, knows_classes
from moee_analysis.models.inputs import like
from moee_analysis.utils.checks import draw_numbers, one_of

REFERENCE = ""  # key of the reference's own scores; no system is called so

BESIDE = (  # columns that compare with the reference
    "retention", "retention_low", "retention_high", "agreement", "kl", "kl_error",
    "reference_top1",
)  # fmt: skip

Models = nn.Module | Mapping[str, nn.Module]
Scores = dict[str, np.ndarray]


def accuracy(
    models: Models,
    images: ImageSet,
    *,
    reference: nn.Module | str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    resamples: int = 1000,
) -> pd.DataFrame:
    """Accuracy of one or several models on the same images, one row per model.

    The images are prepared once for all, by the transform of the reference, or else of the first
    model. ``models`` are by the name of their system; ``reference`` is the dense model, or its name
    among them: None leaves the columns that compare with it empty.

    Columns: ``system``, ``top1``, ``low``, ``high`` (95 % bootstrap interval of ``top1``),
    ``top5``, ``retention`` (``top1`` / that of the reference), ``retention_low``,
    ``retention_high`` (paired bootstrap: both models on the same resampled images), ``agreement``
    (share of images with the reference's prediction), ``kl`` (mean KL(reference || model) in nats),
    ``kl_error`` (standard error of that mean), ``reference_top1``, ``n_images``. All others are
    shares, 0 to 1.
    Raises MoeeError: no images, no models, no resamples, a reference that is not among them.
    """
    draw_numbers(seed, resamples=resamples)
    systems = _name_models(models)
    if isinstance(reference, str):
        one_of("reference", reference, systems)
        reference = systems[reference]
    scores = score_images(systems, images, reference=reference, batch_size=batch_size)
    return summarize(scores, seed=seed, resamples=resamples)


def agreement(models: Models, images: ImageSet, *, reference: nn.Module) -> pd.DataFrame:
    """Compare the outputs of models, of any head or none, with those of the dense ``reference``.

    Columns: ``system``, ``agreement`` and ``kl`` as in :func:`accuracy`, both empty where the
    outputs are no scores of classes; ``cosine`` (mean over images, of the outputs), ``error`` (root
    of the summed squares of the differences, as a share of the reference's outputs), ``n_images``.
    Raises MoeeError: no images or models, or one whose outputs are of another shape.
    """
    systems = _name_models(models)
    check_any(images)
    parts: dict[str, list[dict[str, float]]] = {name: [] for name in systems}
    for x in decode_batches(reference, images, label="agreement"):
        wanted = _run(reference, x)
        for name, model in systems.items():
            parts[name].append(_compare_outputs(name, _run(model, x), wanted))
    rows = []
    for name, batches in parts.items():
        sums = {key: math.fsum(batch[key] for batch in batches) for key in batches[0]}
        squares, wanted_squares = sums.pop("squares"), sums.pop("wanted")
        row = {"system": name} | {key: total / len(images) for key, total in sums.items()}
        if not is_classifier(reference):
            row |= {"agreement": math.nan, "kl": math.nan}
        row["error"] = math.sqrt(squares / wanted_squares) if wanted_squares else math.nan
        rows.append(row | {"n_images": len(images)})
    return pd.DataFrame(rows)


def score_images(
    systems: Mapping[Hashable, nn.Module],
    images: ImageSet,
    *,
    reference: nn.Module | None = None,
    batch_size: int | None = None,
) -> dict[Hashable, Scores]:
    """Score every image by every model, in the order of the images; no images are refused.

    By system ``right`` and ``top5``, bool (images,), and with a reference, whose own scores stand
    under :data:`REFERENCE`, ``agreement``, bool, and ``kl``, float.
    """
    check_any(images)
    contestants = dict(systems) if reference is None else {**systems, REFERENCE: reference}
    first = next(iter(systems.values())) if reference is None else reference
    named = next(filter(knows_classes, (first, *systems.values())), first)
    labels = torch.from_numpy(images.labels(named))
    size = fitting_batch(first, batch_size)
    batches = decode_batches(first, images, size, label="accuracy")
    parts: dict[Hashable, list[Scores]] = {name: [] for name in contestants}
    for x, truth in zip(batches, labels.split(size), strict=True):
        logits = _run_all(contestants.values(), x)
        for name, model in contestants.items():
            parts[name].append(_score(logits[model], truth, logits.get(reference)))
    return {
        name: {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
        for name, batches in parts.items()
    }


def summarize(
    scores: Mapping[Hashable, Scores], *, seed: int = 0, resamples: int = 1000
) -> pd.DataFrame:
    """Return the table of :func:`accuracy` of some :func:`score_images`."""
    scores = dict(scores)
    own = scores.pop(REFERENCE, {}).get("right")
    drawn = {"seed": seed, "resamples": resamples}
    return pd.DataFrame([{"system": name} | _sum_up(s, own, **drawn) for name, s in scores.items()])


def _name_models(models: Models) -> dict[str, nn.Module]:
    systems = dict(models) if isinstance(models, Mapping) else {"model": models}
    if not systems:
        raise MoeeError("at least one model", "none", "pass a model or a mapping of models")
    return systems


def _run_all(models: Iterable[nn.Module], x: torch.Tensor) -> dict[nn.Module, torch.Tensor]:
    """Logits (images, classes) of every distinct model."""
    logits = {model: _run(model, x).float() for model in dict.fromkeys(models)}
    outputs = {of_model.shape[1] for of_model in logits.values()}
    if len(outputs) > 1:
        found = f"{' and '.join(map(str, sorted(outputs)))} outputs"
        hint = "compare those that were made from one model"
        raise MoeeError("models of the same classes", found, hint)
    return logits


def _score(logits: torch.Tensor, truth: torch.Tensor, own: torch.Tensor | None) -> Scores:
    """One number per image and score, from logits [B, classes] and the reference's ``own``."""
    best = logits.topk(min(5, logits.shape[1])).indices
    hits = best == truth[:, None]
    scores = {"right": hits[:, 0], "top5": hits.any(1)}
    if own is not None:
        scores["agreement"] = best[:, 0] == own.argmax(1)
        p, q = log_softmax(own, 1), log_softmax(logits, 1)
        scores["kl"] = kl_div(q, p, log_target=True, reduction="none").sum(1)
    return {name: values.numpy() for name, values in scores.items()}


def _sum_up(
    scores: Scores, own: np.ndarray | None, *, seed: int, resamples: int
) -> dict[str, float]:
    right = scores["right"]
    # only which of the two is right matters, so resampling the images is the same as drawing the
    # sizes of the four groups from a multinomial
    groups = np.bincount(2 * right + (right if own is None else own), minlength=4) / len(right)
    sizes = np.random.default_rng(seed).multinomial(len(right), groups, size=resamples)
    _, of_own, of_right, of_both = (sizes / len(right)).T
    draws, own_draws = of_right + of_both, of_own + of_both
    low, high = np.quantile(draws, MIDDLE)
    row = {"top1": right.mean(), "low": low, "high": high, "top5": scores["top5"].mean()}
    row |= dict.fromkeys(BESIDE, math.nan) | {"n_images": len(right)}
    if own is not None:
        known = own_draws > 0  # other resamples say nothing: the reference gets nothing right
        if known.any():
            ratios = draws[known] / own_draws[known]
            row["retention_low"], row["retention_high"] = np.quantile(ratios, MIDDLE)
        row["retention"] = right.mean() / own.mean() if own.any() else math.nan
        row["agreement"], row["kl"] = scores["agreement"].mean(), scores["kl"].mean()
        row["kl_error"] = scores["kl"].std() / math.sqrt(len(right))
        row["reference_top1"] = own.mean()
    return row


def _run(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs of a batch, (images, numbers), float64."""
    with evaluating(model):
        return model(like(x, model)).reshape(len(x), -1).double().cpu()


def _compare_outputs(name: str, found: torch.Tensor, wanted: torch.Tensor) -> dict[str, float]:
    """Sums over the images of a batch."""
    if found.shape != wanted.shape:
        expected = f"outputs of shape {tuple(wanted.shape)}, as of the reference"
        hint = "compare models that were made from one"
        raise MoeeError(expected, f"{tuple(found.shape)} of '{name}'", hint)
    own, other = log_softmax(wanted, 1), log_softmax(found, 1)
    return {
        "agreement": float((found.argmax(1) == wanted.argmax(1)).sum()),
        "kl": float(kl_div(other, own, log_target=True, reduction="sum")),
        "cosine": float(cosine_similarity(found, wanted).sum()),
        "squares": float((found - wanted).square().sum()),
        "wanted": float(wanted.square().sum()),
    }
