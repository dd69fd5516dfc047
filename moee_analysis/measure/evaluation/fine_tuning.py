"""What light fine-tuning gives back, with as many seeds as wanted."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, score_images, summarize
from moee_analysis.measure.evaluation.variants import costs_of
from moee_analysis.measure.routing.bootstrap import over_seeds
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.macs import count
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.utils.progress import progress

SCORES = ["top1", "retention", "agreement", "kl"]
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

    ``runs`` are of one dense model by system, such as one for each budget. The seed of ``config``
    is replaced by the ``seeds``: of the order of the images, their augmentation, and which are held
    out. ``store`` keeps the fine-tuned runs; ``resamples`` are of the bootstrap.

    A row for every run before, and for every run and seed after: ``system``, ``budget`` (number of
    the run of its system, from 0), ``stage`` (``before`` or ``after``), ``seed``; ``top1``,
    ``retention``, ``agreement``, ``kl`` as in ``measure.accuracy``; ``mean``, ``low``, ``high``:
    retention over all seeds of the stage, and its 95 % interval by a bootstrap of images and of
    seeds; ``macs_reduction``, ``params_reduction``; ``epoch`` whose weights are kept.
    Raises MoeeError: no runs, no seeds, or images that are in both sets.
    """
    if not seeds or not runs or not all(runs.values()):
        raise MoeeError("a run or more of every system, and a seed", "none", "name some")
    check_disjoint(training, images, use="trained on")
    dense = next(iter(runs.values()))[0].dense()
    whole = [(system, n, run) for system, own in runs.items() for n, run in enumerate(own)]
    jobs = [(system, n, seed, run) for system, n, run in whole for seed in seeds]
    tuned = {
        (system, n, AFTER, seed): finetune(run, training, replace(config, seed=seed), store=store)
        for system, n, seed, run in progress(jobs, label="fine-tuning runs")
    }
    models = {(system, n, BEFORE, seeds[0]): run.model for system, n, run in whole}
    models |= {key: each.run.model for key, each in tuned.items()}
    scores = score_images(models, images, reference=dense)
    own, counted = scores[REFERENCE]["right"], count(dense)
    costs = pd.DataFrame([costs_of(model, dense, counted) for model in models.values()])
    table = pd.DataFrame(list(models), columns=["system", "budget", "stage", "seed"])
    stages = table.groupby(["system", "budget", "stage"], sort=False)["seed"]
    spread = {}
    for stage, of_stage in stages:
        right = np.stack([scores[*stage, seed]["right"] for seed in of_stage])
        spread[stage] = over_seeds(right, own, resamples=resamples)
    table = table.join(summarize(scores, resamples=1)[SCORES])
    table = table.join(pd.DataFrame([spread[key[:3]] for key in models]))
    table = table.join(costs[["macs_reduction", "params_reduction"]])
    table["epoch"] = [tuned[key].best if key in tuned else 0 for key in models]
    facts = next(iter(tuned.values())).run.provenance["finetunings"][-1]
    settings = facts["config"]
    return add_caption(
        table,
        f"{len(images)} images evaluated, trained on {facts['n_images']} others of "
        f"{facts['images']} ({facts['n_held_out']} held out) for {settings['epochs']} epochs of "
        f"AdamW at {settings['learning_rate']:g}, batch {settings['batch_size']}; {len(seeds)} "
        "seeds; bars are 95 % intervals of a bootstrap of images and seeds.",
    )
