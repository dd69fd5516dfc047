"""Models that differ in how they start, trained by one recipe with several seeds."""

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
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.training.config import SupervisedConfig
from moee_analysis.training.jobs import HISTORY, RIGHT, WEIGHTS, TrainingBench, TrainingJob
from moee_analysis.utils.checks import seed_number

Start = Callable[[int], nn.Module]
"""What makes the model that is trained with a seed."""


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
    starts: Mapping[str, Start],
    training: ImageSet,
    images: ImageSet,
    config: SupervisedConfig,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    store: str | Path,
    workers: int = 1,
) -> Trainings:
    """Train what every start makes with every seed, by one recipe.

    Every training computes with one thread on a CPU, so that its bytes are the same whatever else
    is trained beside it.

    ``starts`` are by name: seed -> model, alike in how they see images; ``config`` is the recipe,
    whose seed is replaced, and is that of the start too. ``images`` are evaluated at the start,
    every ``config.check_every`` steps, and at the end. A notebook that runs again finds the
    trainings in the ``store``. ``workers`` train side by side, for models on a CPU; a script that
    has more than one must be guarded by ``if __name__ == "__main__":``.

    Raises MoeeError: no starts or no seeds; images that are in both sets; a loss that is not
    finite.
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
    models = {name: jobs[name, seeds[0]].model for name in starts}
    sizes = [
        {"start": name, "macs": count(model, sites=[]).total, "params": count_parameters(model)}
        for name, model in models.items()
    ]
    bench = TrainingBench(training, images, Path(store))
    folders = dict(zip(jobs, bench.all_done(list(jobs.values()), workers=workers), strict=True))
    histories = {key: pd.read_csv(folder / HISTORY) for key, folder in folders.items()}
    whole = pd.concat(histories, names=["start", "seed", None]).reset_index(["start", "seed"])
    right = np.stack([np.load(folder / RIGHT) for folder in folders.values()])
    return Trainings(
        whole.reset_index(drop=True),
        right.reshape(len(starts), len(seeds), *right.shape[1:]),
        pd.DataFrame(sizes),
        folders,
        _caption(training, images, config, seeds),
    )


def _caption(
    training: ImageSet, images: ImageSet, config: SupervisedConfig, seeds: Sequence[int]
) -> str:
    return (
        f"{len(images)} images evaluated; trained on {len(training)} others, "
        f"{config.steps * config.batch_size} shown in {config.steps} steps of {config.batch_size}, "
        f"AdamW at {config.learning_rate:g}; {len(seeds)} seeds; intervals are 95 % of a "
        "bootstrap of images and seeds."
    )
