"""What trainings give: light fine-tuning, and models that start in different ways.

Intervals are of one bootstrap of images and of seeds: of the learning curves n - 1 of n seeds are
drawn, which gives the mean of few its whole variance, the same draws for all models.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
from safetensors.torch import load_file
from torch import nn

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import REFERENCE, score_images, summarize
from moee_analysis.measure.evaluation.variants import costs_of
from moee_analysis.measure.routing.bootstrap import MIDDLE, over_seeds, repeat
from moee_analysis.measure.routing.tables import add_caption, stack
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.training.config import FinetuneConfig, SupervisedConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.training.supervised import HISTORY, RIGHT, WEIGHTS, TrainingBench, TrainingJob
from moee_analysis.utils.checks import seed_number
from moee_analysis.utils.progress import progress

SCORES = ["top1", "retention", "agreement", "kl"]


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
    is replaced by the ``seeds``: of the images' order and augmentation, and which are held out.

    A row for every run before, and for every run and seed after: ``system``, ``budget`` (number of
    the run of its system, from 0), ``stage`` (``before`` or ``after``), ``seed``; ``top1``,
    ``retention``, ``agreement``, ``kl`` as in ``measure.accuracy``; ``mean``, ``low``, ``high``:
    retention over all seeds of the stage, and its 95 % interval; ``macs_reduction``,
    ``params_reduction``; ``epoch`` whose weights are kept.
    Raises MoeeError: no runs, no seeds, or images that are in both sets.
    """
    if not seeds or not runs or not all(runs.values()):
        raise MoeeError("a run or more of every system, and a seed", "none", "name some")
    check_disjoint(training, images, use="trained on")
    dense = next(iter(runs.values()))[0].dense()
    whole = {(system, n): run for system, own in runs.items() for n, run in enumerate(own)}
    jobs = [(key, seed) for key in whole for seed in seeds]
    tuned = {}
    for key, seed in progress(jobs, label="fine-tuning runs"):
        seeded = replace(config, seed=seed)
        tuned[*key, "after", seed] = finetune(whole[key], training, seeded, store=store)
    models = {(*key, "before", seeds[0]): run.model for key, run in whole.items()}
    models |= {key: each.run.model for key, each in tuned.items()}
    scores = score_images(models, images, reference=dense)
    own, counted = scores[REFERENCE]["right"], count(dense)
    costs = pd.DataFrame([costs_of(model, dense, counted) for model in models.values()])
    table = pd.DataFrame(list(models), columns=["system", "budget", "stage", "seed"])
    spread = {}
    for stage, of_stage in table.groupby(["system", "budget", "stage"], sort=False)["seed"]:
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


@dataclass(frozen=True)
class Trainings:
    """What became of every start with every seed.

    ``history``: one row for each ``start``, ``seed`` and look at the images, in this order: with
      ``step``, ``epoch``, ``images`` (seen so far), ``loss`` and ``top1`` (``Trained``).
    ``right``: bool (starts, seeds, looks, images): whether the model was right.
    ``sizes``: one row for each ``start``: ``macs`` of an image and stored ``params``.
    ``folders``: where the store keeps each training, by start and seed.
    """

    history: pd.DataFrame
    right: np.ndarray
    sizes: pd.DataFrame
    folders: Mapping[tuple[str, int], Path]
    caption: str

    @property
    def starts(self) -> list[str]:
        """Names of the starts."""
        return list(self.sizes["start"])

    def of(self, names: Iterable[str]) -> Self:
        """Those of some starts, in the order of ``names``."""
        names = list(names)
        return replace(
            self,
            history=self.history.set_index("start").loc[names].reset_index(),
            right=self.right[[self.starts.index(name) for name in names]],
            sizes=self.sizes.set_index("start").loc[names].reset_index(),
        )

    def trained(self, start: str, seed: int, model: nn.Module) -> nn.Module:
        """Give ``model``, made as that start makes it, the weights it was trained to."""
        model.load_state_dict(load_file(self.folders[start, seed] / WEIGHTS))
        return model


def trainings(
    starts: Mapping[str, Callable[[int], nn.Module]],
    training: ImageSet,
    images: ImageSet,
    config: SupervisedConfig,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    store: str | Path,
    workers: int = 1,
) -> Trainings:
    """Train what every start makes with every seed, by one recipe, unless the ``store`` has it.

    ``starts`` are by name: seed -> model, alike in how they see images; ``config`` is the recipe,
    whose seed is replaced, and is that of the start too. ``images`` are evaluated at the start,
    every ``config.check_every`` steps, and at the end. ``workers`` train side by side on a CPU,
    with one thread each; scripts with several need ``if __name__ == "__main__":``.
    Raises MoeeError: no starts or seeds, images that are in both sets, a loss that is not finite.
    """
    for seed in seeds:
        seed_number(seed, "seeds")
    if not isinstance(seeds, Sequence) or not starts or not seeds or len(set(seeds)) < len(seeds):
        raise MoeeError("a start or more, and seeds that differ", "none, or twice", "name some")
    check_disjoint(training, images, use="trained on")
    jobs = {
        (name, seed): TrainingJob(name, start(seed), replace(config, seed=seed))
        for name, start in starts.items()
        for seed in seeds
    }
    models = [jobs[name, seeds[0]].model for name in starts]
    sizes = pd.DataFrame({"start": list(starts)})
    sizes["macs"] = [count(model, sites=[]).total for model in models]
    sizes["params"] = [count_parameters(model) for model in models]
    bench = TrainingBench(training, images, Path(store))
    folders = dict(zip(jobs, bench.all_done(list(jobs.values()), workers=workers), strict=True))
    parts = [(*key, pd.read_csv(folder / HISTORY)) for key, folder in folders.items()]
    right = np.stack([np.load(folder / RIGHT) for folder in folders.values()])
    return Trainings(
        stack(parts, by=("start", "seed")),
        right.reshape(len(starts), len(seeds), *right.shape[1:]),
        sizes,
        folders,
        f"{len(images)} images evaluated; trained on {len(training)} others, "
        f"{config.steps * config.batch_size} shown in {config.steps} steps of {config.batch_size}, "
        f"AdamW at {config.learning_rate:g}; {len(seeds)} seeds; intervals are 95 % of a "
        "bootstrap of images and seeds.",
    )


def learning_curves(trained: Trainings, *, resamples: int = 500) -> pd.DataFrame:
    """Top-1 against the images seen, start by start.

    The rows of ``trained.history``, and of all seeds ``mean``, ``low``, ``high`` (95 % interval).
    """
    draws = draw_curves(trained, resamples)
    columns = np.stack([trained.right.mean(axis=(1, 3)), *np.quantile(draws, MIDDLE, axis=0)])
    of_seeds = columns[:, :, None].repeat(trained.right.shape[1], axis=2)  # starts, seeds, looks
    table = trained.history.copy()
    table[["mean", "low", "high"]] = of_seeds.reshape(3, -1).T
    return add_caption(table, trained.caption)


def learned(
    trained: Trainings, *, level: float | None = None, resamples: int = 500
) -> pd.DataFrame:
    """What each start comes to, what it costs, and how soon it comes near.

    One row for each ``start``: final ``top1``, mean of the seeds, its 95 % interval ``low``,
    ``high``, and that of the ``worst`` and ``best`` seed; ``macs`` of an image, ``params``;
    ``level`` (None: what the start that ends lowest comes to), and the ``images`` seen until the
    mean of the seeds reaches it (between two looks by a straight line; nan: never), with
    ``images_low``, ``images_high`` (95 %; infinite: never).
    """
    final = trained.right[:, :, -1].mean(axis=2)  # (starts, seeds)
    level = final.mean(axis=1).min() if level is None else level
    draws = draw_curves(trained, resamples)
    seen = trained.history["images"].unique()
    reached = np.apply_along_axis(_find_level, 2, draws, seen, level)
    reached_low, reached_high = np.quantile(reached, MIDDLE, axis=0, method="nearest")
    low, high = np.quantile(draws[:, :, -1], MIDDLE, axis=0)
    own = [_find_level(curve, seen, level) for curve in trained.right.mean(axis=(1, 3))]
    table = trained.sizes.assign(
        top1=final.mean(axis=1), low=low, high=high, worst=final.min(axis=1),
        best=final.max(axis=1), level=level, images=np.where(np.isinf(own), np.nan, own),
        images_low=reached_low, images_high=reached_high,
    )  # fmt: skip
    return add_caption(table, trained.caption)


def which_beats_which(trained: Trainings, *, resamples: int = 500) -> pd.DataFrame:
    """Differences of the final top-1 of every two starts, on the same images and seeds.

    One row for each ordered pair: ``start_a``, ``start_b``, ``order_a``, ``order_b`` (places);
    ``difference`` (top-1 of a less that of b), ``low``, ``high`` (95 %); ``beats``: ``low`` > 0.
    """
    final = trained.right[:, :, -1].mean(axis=(1, 2))
    draws = draw_curves(trained, resamples)[:, :, -1]
    starts = pd.DataFrame({"start": trained.starts, "order": range(len(final))})
    pairs = starts.merge(starts, how="cross", suffixes=("_a", "_b"))
    a, b = pairs["order_a"], pairs["order_b"]
    low, high = np.quantile(draws[:, a] - draws[:, b], MIDDLE, axis=0)
    pairs = pairs[["start_a", "start_b", "order_a", "order_b"]]
    pairs = pairs.assign(difference=final[a] - final[b], low=low, high=high, beats=low > 0)
    return add_caption(pairs, trained.caption)


def beats_all(pairs: pd.DataFrame, start: str, others: Iterable[str]) -> bool | None:
    """Whether ``start`` beats every one of ``others`` in a table of :func:`which_beats_which`.

    True where all intervals lie above 0, False where one lies below, None otherwise.
    """
    rows = pairs.set_index(["start_a", "start_b"]).loc[[(start, other) for other in others]]
    if (rows["high"] < 0).any():
        return False
    return True if (rows["low"] > 0).all() else None


def draw_curves(trained: Trainings, resamples: int) -> np.ndarray:
    """Resampled mean curves (resamples, starts, looks); the same draws whenever asked."""
    right = trained.right.astype(np.float32)
    _, seeds, _, images = right.shape

    def resample(rng: np.random.Generator) -> np.ndarray:
        times = rng.multinomial(max(1, seeds - 1), np.full(seeds, 1 / seeds))
        of_seeds = (times / times.sum()).astype(np.float32)  # how much each of them weighs
        of_images = rng.multinomial(images, np.full(images, 1 / images)) / images
        weights = of_seeds, of_images.astype(np.float32)
        return np.einsum("sklm,k,m->sl", right, *weights, optimize=True)

    return repeat(resample, times=resamples, seed=0)


def _find_level(curve: np.ndarray, seen: np.ndarray, level: float) -> float:
    """Images seen when a curve first comes to ``level``; infinite where it never does."""
    above = np.flatnonzero(curve >= level - 1e-9)
    if not len(above):
        return np.inf
    place = above[0]
    if place == 0:
        return float(seen[0])
    part = (level - curve[place - 1]) / (curve[place] - curve[place - 1])
    return float(seen[place - 1] + min(1.0, part) * (seen[place] - seen[place - 1]))
