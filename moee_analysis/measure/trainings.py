"""Models that differ in how they start, trained by one recipe with several seeds."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moee_analysis.counting import count, count_parameters
from moee_analysis.errors import MoeeError
from moee_analysis.models import fingerprint
from moee_analysis.progress import progress
from moee_analysis.store import content_key, kept, write_json
from moee_analysis.supervised_training import train
from moee_analysis.training_batches import Loaded

if TYPE_CHECKING:
    from moee_analysis.images import ImageSet
    from moee_analysis.supervised_config import SupervisedConfig

Start = Callable[[int], nn.Module]
"""What makes the model that is trained with a seed."""

_HISTORY, _RIGHT, _WEIGHTS = "history.csv", "right.npy", "model.safetensors"


@dataclass(frozen=True)
class Trainings:
    """What became of every start with every seed.

    Attributes
    ----------
    history
        One row for each ``start``, ``seed`` and look at the images, in this order: with ``step``,
        ``epoch``, ``images`` (seen so far), ``loss`` and ``top1``
        (:class:`~moee_analysis.supervised_training.Trained`).
    right
        bool (starts, seeds, looks, images): whether the model was right.
    sizes
        One row for each ``start``: ``macs`` of an image and stored ``params``.
    folders
        Where the store keeps each training, by start and seed.
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

    def of(self, names: Iterable[str]) -> Trainings:
        """Those of some starts, in the order of ``names``."""
        names = list(names)
        chosen = dict(list(self.history.groupby("start")))
        return replace(
            self,
            history=pd.concat([chosen[name] for name in names], ignore_index=True),
            right=self.right[[self.starts.index(name) for name in names]],
            sizes=self.sizes.set_index("start").loc[names].reset_index(),
        )

    def trained(self, start: str, seed: int, model: nn.Module) -> nn.Module:
        """Give ``model``, made as that start makes it, the weights it was trained to."""
        model.load_state_dict(load_file(self.folders[start, seed] / _WEIGHTS))
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

    Parameters
    ----------
    starts
        By name: seed -> model, alike in how they see images.
    training
        Images to train on.
    images
        Others, to evaluate: at the start, every ``config.check_every`` steps, and at the end.
    config
        The recipe; its seed is replaced, and is that of the start too.
    store
        Folder that keeps every training, under what decides it: a notebook that runs again finds
        them.
    workers
        Processes that train side by side, for models on a CPU. A script that has more than one
        must be guarded by ``if __name__ == "__main__":``.

    Raises
    ------
    MoeeError
        No starts or no seeds; images that are in both sets; a loss that is not finite.
    """
    _check(starts, training, images, seeds)
    jobs = {
        (name, seed): _Job(name, start(seed), replace(config, seed=seed), Path(store))
        for name, start in starts.items()
        for seed in seeds
    }
    sizes = [_size(name, jobs[name, seeds[0]].model) for name in starts]
    sets = _Sets(training, images)
    folders = dict(zip(jobs, _done(list(jobs.values()), sets, workers), strict=True))
    histories = [
        pd.read_csv(folder / _HISTORY).assign(start=name, seed=seed)
        for (name, seed), folder in folders.items()
    ]
    right = np.stack([np.load(folder / _RIGHT) for folder in folders.values()])
    whole = pd.concat(histories, ignore_index=True)
    first = ["start", "seed"]
    return Trainings(
        whole[[*first, *(column for column in whole if column not in first)]],
        right.reshape(len(starts), len(seeds), *right.shape[1:]),
        pd.DataFrame(sizes),
        folders,
        _caption(training, images, config, seeds),
    )


def _check(
    starts: Mapping[str, Start], training: ImageSet, images: ImageSet, seeds: Sequence[int]
) -> None:
    if not starts or not seeds or len(set(seeds)) < len(seeds):
        raise MoeeError("a start or more, and seeds that differ", "none, or twice", "name some")
    digests = [{s.source.digest(row) for row in s.rows} for s in (training, images)]
    if set.intersection(*digests):
        raise MoeeError(
            "images to evaluate that are not trained on",
            f"{len(set.intersection(*digests))} that are", "choose others",
        )  # fmt: skip


@dataclass(frozen=True)
class _Sets:
    """Images to train on and to evaluate, loaded when they are first needed in a process."""

    training: ImageSet
    images: ImageSet

    def loaded(self, model: nn.Module) -> tuple[Loaded, Loaded]:
        """Both of them, as ``model`` sees images."""
        if "_loaded" not in vars(self):
            both = Loaded.of(self.training, model), Loaded.of(self.images, model)
            object.__setattr__(self, "_loaded", both)
        return vars(self)["_loaded"]


@dataclass(frozen=True)
class _Job:
    """One training, and the store where it is kept."""

    name: str
    model: nn.Module
    config: SupervisedConfig
    store: Path

    def folder(self, sets: _Sets) -> Path:
        """Where it is, or will be, kept: by everything that decides it."""
        key = content_key(
            model=fingerprint(self.model),
            settings=_settings(self.model),
            training=sets.training.fingerprint,
            images=sets.images.fingerprint,
            config=asdict(self.config),
        )
        return self.store / f"trained-{key}"

    def fill(self, folder: Path, *, sets: _Sets) -> None:
        """Train, and write what came of it."""
        training, images = sets.loaded(self.model)
        with _one_thread():
            trained = train(self.model, training, self.config, check=images)
        trained.history.to_csv(folder / _HISTORY, index=False)
        np.save(folder / _RIGHT, trained.right)
        save_file(trained.model.state_dict(), folder / _WEIGHTS)
        write_json(folder / "config.json", asdict(self.config))

    def done(self, folder: Path, sets: _Sets) -> None:
        """Train and keep, unless the folder is there."""
        try:
            kept(folder.parent, folder.name, partial(self.fill, sets=sets))
        except MoeeError as error:
            found = f"'{self.name}': {error.found}"
            raise MoeeError(error.expected, found, error.hint) from None


def _done(jobs: Sequence[_Job], sets: _Sets, workers: int) -> list[Path]:
    """Do what is not in the store; return all folders."""
    folders = [job.folder(sets) for job in jobs]
    missing = {f: j for f, j in zip(folders, jobs, strict=True) if not f.is_dir()}
    if workers > 1 and len(missing) > 1:
        spawned = {"mp_context": multiprocessing.get_context("spawn")}
        processes = min(workers, len(missing))
        with ProcessPoolExecutor(processes, **spawned, initializer=_get, initargs=(sets,)) as pool:
            waiting = pool.map(_do, missing.values(), missing)
            deque(progress(waiting, label="trainings", total=len(missing)), maxlen=0)
    else:
        for folder, job in progress(missing.items(), label="trainings", total=len(missing)):
            job.done(folder, sets)
    return folders


def _get(sets: _Sets) -> None:
    """Begin a process that trains: what it trains on stays there."""
    _own.append(sets)


def _do(job: _Job, folder: Path) -> None:
    """One training in a process of its own."""
    job.done(folder, _own[-1])


_own: list[_Sets] = []


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _settings(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What every module is and was told, but for its weights: rates of dropout, noise, numbers."""
    plain = (int, float, str, type(None))
    return {
        name: {"": type(module).__name__}
        | {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"}
        for name, module in model.named_modules()
    }


def _size(name: str, model: nn.Module) -> dict[str, Any]:
    return {
        "start": name,
        "macs": count(model, sites=[]).total,
        "params": count_parameters(model),
    }


def _caption(
    training: ImageSet, images: ImageSet, config: SupervisedConfig, seeds: Sequence[int]
) -> str:
    return (
        f"{len(images)} images evaluated; trained on {len(training)} others, "
        f"{config.steps * config.batch_size} shown in {config.steps} steps of {config.batch_size}, "
        f"AdamW at {config.learning_rate:g}; {len(seeds)} seeds; intervals are 95 % of a "
        "bootstrap of images and seeds."
    )
