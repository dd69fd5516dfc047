"""Trainings that the store keeps, one after the other or in processes side by side."""

import multiprocessing
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import fingerprint
from moee_analysis.training.batches import Loaded
from moee_analysis.training.config import SupervisedConfig
from moee_analysis.training.supervised import train
from moee_analysis.utils.progress import progress
from moee_analysis.utils.signals import die_after
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build, present

HISTORY, RIGHT, WEIGHTS = "history.csv", "right.npy", "model.safetensors"
"""Files of a training: what ``train`` returns."""


@dataclass(frozen=True)
class TrainingJob:
    """A model to train by a recipe; errors call it by its name."""

    name: str
    model: nn.Module
    config: SupervisedConfig


@dataclass
class TrainingBench:
    """Where jobs are done: images to train on and to evaluate, and the store of the results."""

    training: ImageSet
    images: ImageSet
    store: Path
    loaded: tuple[Loaded, Loaded] | None = None

    def all_done(self, jobs: Sequence[TrainingJob], *, workers: int = 1) -> list[Path]:
        """Do all jobs that the store does not have; return the folders of all.

        Each computes with one thread on a CPU: the same bytes with any number of processes. Raises
        ``MoeeError``: what ``train`` refuses, and the job's name.
        """
        folders = [self.folder(job) for job in jobs]
        missing = {f: job for f, job in zip(folders, jobs, strict=True) if not present(f)}
        if workers > 1 and len(missing) > 1:
            doing = self._side_by_side(missing, min(workers, len(missing)))
        else:
            doing = map(self.do, missing.values(), missing)
        deque(progress(doing, label="trainings", total=len(missing)), maxlen=0)
        return folders

    def folder(self, job: TrainingJob) -> Path:
        """Where a job is, or will be, kept: by everything that decides it."""
        plain = (int, float, str, type(None))
        settings = {  # what modules were told beside their weights: rates of dropout, noise
            name: {"": type(module).__name__}
            | {k: v for k, v in vars(module).items() if isinstance(v, plain) and k != "training"}
            for name, module in job.model.named_modules()
        }
        key = content_key(
            model=fingerprint(job.model),
            settings=settings,
            training=self.training.fingerprint,
            images=self.images.fingerprint,
            config=asdict(job.config),
        )
        return self.store / f"trained-{key}"

    def do(self, job: TrainingJob, folder: Path) -> None:
        """Train and keep, unless the folder is there."""
        try:
            get_or_build(folder.parent, folder.name, partial(self._fill, job=job))
        except MoeeError as error:
            found = f"'{job.name}': {error.found}"
            raise MoeeError(error.expected, found, error.hint) from None

    def _fill(self, folder: Path, *, job: TrainingJob) -> None:
        if self.loaded is None:
            self.loaded = tuple(Loaded.of(each, job.model) for each in (self.training, self.images))
        training, images = self.loaded
        with _one_thread():
            trained = train(job.model, training, job.config, check=images)
        trained.history.to_csv(folder / HISTORY, index=False)
        np.save(folder / RIGHT, trained.right)
        save_file(trained.model.state_dict(), folder / WEIGHTS)
        write_json(folder / "config.json", asdict(job.config))

    def _side_by_side(self, missing: dict[Path, TrainingJob], workers: int) -> Iterator[None]:
        """Do jobs in fresh processes, each of which loads the images once."""
        context, bare = multiprocessing.get_context("spawn"), replace(self, loaded=None)
        others = set(multiprocessing.active_children())
        with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(bare,)) as pool:
            try:
                yield from pool.map(_do, missing.values(), missing)
            except (KeyboardInterrupt, SystemExit):  # what is under way is not waited for
                pool.shutdown(wait=False, cancel_futures=True)
                for worker in set(multiprocessing.active_children()) - others:
                    worker.terminate()
                raise


_OWN: list[TrainingBench] = []  # of a process that was begun for jobs


@contextmanager
def _one_thread() -> Iterator[None]:
    # as torch.utils.benchmark has it, which looks for compilers and may warn about them
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(before)


def _begin(bench: TrainingBench) -> None:
    die_after(multiprocessing.parent_process().join)
    _OWN.append(bench)


def _do(job: TrainingJob, folder: Path) -> None:
    _OWN[-1].do(job, folder)
