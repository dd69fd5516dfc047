"""What light fine-tuning gives back, with as many seeds as wanted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, image_scores
from moee_analysis.measure.evaluation.variants import savings
from moee_analysis.measure.routing.bootstrap import over_seeds
from moee_analysis.models.macs import count
from moee_analysis.training.finetune import Finetuned, finetune
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.utils.progress import progress

Scores = dict[str, np.ndarray]

BEFORE, AFTER = "before", "after"


def fine_tuning(
    runs: Mapping[str, Sequence[Extraction]],
    training: ImageSet,
    images: ImageSet,
    config: FinetuneConfig,
    *,
    store: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    resamples: int = 1000,
) -> pd.DataFrame:
    """Fine-tune every run by the same recipe with every seed, and evaluate all on ``images``.

    Parameters
    ----------
    runs
        Runs of one dense model by system, such as one for each budget.
    training
        Images to train on, none of them among ``images``.
    config
        The recipe; its seed is replaced.
    store
        Folder that keeps the fine-tuned runs.
    seeds
        Of the fine-tuning: the order of the images, their augmentation, and which are held out.
    resamples
        Of the bootstrap.

    Returns
    -------
    DataFrame
        A row for every run before, and for every run and seed after: ``system``, ``budget`` (number
        of the run of its system, from 0), ``stage`` (``before`` or ``after``), ``seed``; ``top1``,
        ``retention``, ``agreement``, ``kl`` as in ``measure.accuracy``; ``mean``, ``low``,
        ``high``: retention over all seeds of the stage, and its 95 % interval by a bootstrap of
        images and of seeds; ``macs_reduction``, ``params_reduction``; ``epoch`` whose weights are
        kept.

    Raises
    ------
    MoeeError
        No runs, no seeds, or images that are in both sets.
    """
    _check(runs, training, images, seeds)
    dense = next(iter(runs.values()))[0].dense()
    whole = [(system, n, run) for system, own in runs.items() for n, run in enumerate(own)]
    jobs = [(system, n, seed, run) for system, n, run in whole for seed in seeds]
    tuned = {
        (system, n, seed): finetune(run, training, replace(config, seed=seed), store=store)
        for system, n, seed, run in progress(jobs, label="fine-tuning runs")
    }
    models = {(system, n, BEFORE, seeds[0]): run.model for system, n, run in whole}
    models |= {(system, n, AFTER, seed): t.run.model for (system, n, seed), t in tuned.items()}
    scores = image_scores(models, images, reference=dense)
    counted, own = count(dense), scores.pop(REFERENCE)["right"]
    rows = [
        {"system": system, "budget": n, "stage": stage, "seed": seed}
        | _scored(scores[system, n, stage, seed], own)
        | _together(scores, own, (system, n, stage), resamples)
        | savings(model, dense, counted)
        | {"epoch": tuned[system, n, seed].best if stage == AFTER else 0}
        for (system, n, stage, seed), model in models.items()
    ]
    table = pd.DataFrame(rows).drop(columns="router_macs")
    table.attrs["caption"] = _caption(tuned, images, seeds)
    return table


def _check(
    runs: Mapping[str, Sequence[Extraction]],
    training: ImageSet,
    images: ImageSet,
    seeds: Sequence[int],
) -> None:
    if not seeds or not runs or not all(runs.values()):
        raise MoeeError("a run or more of every system, and a seed", "none", "name some")
    check_apart(training, images, use="trained on")


def _scored(scores: Scores, own: np.ndarray) -> dict[str, Any]:
    top1 = scores["right"].mean()
    return {
        "top1": top1,
        "retention": top1 / own.mean() if own.any() else np.nan,
        "agreement": scores["agreement"].mean(),
        "kl": scores["kl"].mean(),
    }


def _together(
    scores: Mapping[tuple, Scores], own: np.ndarray, key: tuple, resamples: int
) -> dict[str, float]:
    """Retention over all seeds of a stage, and its interval."""
    right = np.stack([s["right"] for name, s in scores.items() if name[:3] == key])
    return over_seeds(right, own, resamples=resamples)


def _caption(tuned: Mapping[tuple, Finetuned], images: ImageSet, seeds: Sequence[int]) -> str:
    facts = next(iter(tuned.values())).run.provenance["finetunings"][-1]
    settings = facts["config"]
    return (
        f"{len(images)} images evaluated, trained on {facts['n_images']} others of "
        f"{facts['images']} ({facts['n_held_out']} held out) for {settings['epochs']} epochs of "
        f"AdamW at {settings['learning_rate']:g}, batch {settings['batch_size']}; {len(seeds)} "
        "seeds; bars are 95 % intervals of a bootstrap of images and seeds."
    )
