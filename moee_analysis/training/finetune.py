"""Fine-tuning: a run learns to predict what its dense model predicts, its experts staying the same.

Knowledge distillation (Hinton et al., arXiv:1503.02531) without labels; AdamW, with a warm-up and a
cosine. Weights and shifts change, and routers where wanted; which hidden neurons an expert has
never does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from moee_analysis.data.disjoint import contents_of, without_repeats
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction, load
from moee_analysis.extraction.saving.run_files import fill_run
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.moe.layer import moe_layers
from moee_analysis.training.checkpoints import (
    FACTS,
    METRICS,
    Progress,
    checkpoint_facts,
    read_checkpoint,
    remove_checkpoint,
)
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.training.trainer import NOT_FINITE, Training
from moee_analysis.utils.distributed import agreed, all_sum, rank
from moee_analysis.utils.storage.files import check_place, write_text
from moee_analysis.utils.storage.folders import held_folder, new_folder, scratch_folder
from moee_analysis.utils.storage.locks import locked
from moee_analysis.utils.storage.store import (
    content_key,
    kept,
    present,
    set_aside,
    unfinished_folder,
)

_FACT = "finetunings"


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned run and how it came about.

    ``history`` has a row for every epoch, the first before any training: ``epoch``, ``steps``,
    ``loss`` (mean over the training images), and on the images held out ``kl`` (mean
    KL(dense || run) in nats) and ``agreement`` (share of images with the dense prediction). The run
    has the weights after epoch ``best``. ``stopped`` says why the training ended early, if it did.
    """

    run: Extraction
    history: pd.DataFrame
    best: int
    stopped: str

    @property
    def finite(self) -> bool:
        """Whether the loss was finite to the end."""
        return not self.stopped.startswith(NOT_FINITE)


def finetune(
    run: Extraction,
    images: ImageSet,
    config: FinetuneConfig | None = None,
    *,
    out: str | Path | None = None,
    store: str | Path | None = None,
    weights: str | Path | None = None,
) -> Finetuned:
    """Train a copy of the run's model to predict what the dense model predicts.

    Parameters
    ----------
    images
        Training images; those of the calibration will do. Their labels are not used. A part of
        them is held out, see ``config``.
    config
        None is the default :class:`FinetuneConfig`.
    out
        Folder for the fine-tuned run. It appears when the training has ended; until then a
        checkpoint is kept beside it, and a training that was killed goes on there. One that has
        ended is not repeated.
    store
        Folder of a content-keyed store, instead: the fine-tuned run is kept there and found again.
        With neither of them nothing is kept.
    weights
        The dense weights, if they have moved.

    Raises
    ------
    MoeeError
        Fewer than two images; a folder that holds something else; a loss that is not finite before
        any epoch has made the model better.
    """
    config = config or FinetuneConfig()
    if out is not None:
        check_place(Path(out))
    images = without_repeats(images)
    student = copy.deepcopy(run.model).float()  # steps of training are lost in half precision
    dense = run.dense(weights=weights).to(next(student.parameters()).device)
    if next(dense.parameters()).dtype != torch.float32:
        dense = copy.deepcopy(dense).float()
    facts = {"run": fingerprint(student), "dense": fingerprint(dense), "config": asdict(config)}
    key = content_key(**facts, images=images.fingerprint)
    training = Training(student, dense, images, config, Path(), key)
    _check_images(training)
    place = _place(training, out, store)
    if place is None:
        with scratch_folder("training") as root:
            return _of(_trained(replace(training, folder=root), run), run)
    _through(place, training, run)
    return _of(load(place.folder, dense=run.original), run)


def history_of(run: Extraction) -> pd.DataFrame:
    """Return the table of :class:`Finetuned` of a run that was fine-tuned, saved or not.

    Raises
    ------
    MoeeError
        The run was never fine-tuned.
    """
    return pd.DataFrame(_last(run)["history"]).astype({"loss": float})


def _last(run: Extraction) -> dict[str, Any]:
    """Facts of the run's last fine-tuning."""
    found = run.provenance.get(_FACT)
    if not found:
        raise MoeeError("a run that was fine-tuned", "one as it was extracted", "finetune it first")
    return found[-1]


def _of(tuned: Extraction, run: Extraction) -> Finetuned:
    tuned.model.to(next(run.model.parameters()).device)
    facts = _last(tuned)
    tuned = replace(tuned, original=run.original)
    return Finetuned(tuned, history_of(tuned), facts["best"], facts["stopped"])


@dataclass(frozen=True)
class _Place:
    """Where the fine-tuned run is kept: a folder of the user's, or one of a store."""

    folder: Path
    of_store: bool

    @property
    def work(self) -> Path:
        """Where the checkpoint is until then."""
        return unfinished_folder(self.folder)

    def is_filled(self) -> bool:
        """Whether the run is there; what is damaged in a store is made again."""
        return present(self.folder) if self.of_store else self.folder.exists()

    def fill(self, build: Callable[[Path], None]) -> None:
        """Let ``build`` fill the folder, which appears when it is complete."""
        if self.of_store:
            kept(self.folder.parent, self.folder.name, build)
        else:
            with new_folder(self.folder, replace=False) as new:
                build(new)


def _place(training: Training, out: str | Path | None, store: str | Path | None) -> _Place | None:
    """Where the fine-tuned run is kept, if it is."""
    if out is not None:
        return _Place(Path(out).resolve(), of_store=False)
    if store is None:
        return None
    return _Place(Path(store).resolve() / f"finetuned-{training.key}", of_store=True)


def _check_images(training: Training) -> None:
    counts = [len(images) for images in training.sets]
    if min(counts) < 1:
        raise MoeeError(
            "images to train on and others to hold out", f"{counts[0]} and {counts[1]}",
            "give more images, or another share 'held_out'",
        )  # fmt: skip


def _through(place: _Place, training: Training, run: Extraction) -> None:
    """Fill the place with the trained run, unless it is there. One process waits for another."""
    if agreed(place.is_filled()):
        _check_same(place.folder, training.key, run)
        with suppress(OSError), locked(place.work, wait=False):
            remove_checkpoint(place.work)  # left by a kill in the last moment
        return
    with _alone_in(place.work, training.key) if rank() == 0 else nullcontext():
        all_sum(torch.zeros(1))  # none looks at the checkpoint before
        if agreed(place.is_filled()):
            _check_same(place.folder, training.key, run)
        elif rank() == 0:
            place.fill(partial(_fill, work=place.work, training=training, run=run))
        else:
            _trained(replace(training, folder=place.work), run)
        all_sum(torch.zeros(1))  # the folder is there
        if rank() == 0:
            remove_checkpoint(place.work)


@contextmanager
def _alone_in(work: Path, key: str) -> Iterator[None]:
    """Hold the folder of a checkpoint, a damaged one set aside; without one it goes in the end."""
    with held_folder(work):
        _set_damaged_aside(work)
    with held_folder(work):  # made anew where it was
        try:
            _check_key(work, key)
            yield
        finally:
            if not (work / FACTS).exists():
                remove_checkpoint(work)


def _set_damaged_aside(work: Path) -> None:
    try:
        read_checkpoint(work)
    except MoeeError as damage:
        set_aside(work, damage.found, seen=work.lstat())


def _check_key(work: Path, key: str) -> None:
    """Refuse the checkpoint of another training."""
    facts = checkpoint_facts(work)
    if facts is not None and facts["key"] != key:
        raise MoeeError(
            f"the fine-tuning that was begun in '{work}'",
            "another run, other images or other settings",
            "repeat it as it was, remove that folder, or choose another one",
        )


def _check_same(folder: Path, key: str, run: Extraction) -> None:
    there = load(folder, dense=run.original) if folder.is_dir() else None
    known = there and there.provenance.get(_FACT)
    if not known or known[-1]["key"] != key:
        raise MoeeError(
            f"a new folder '{folder}', or what this fine-tuning has left there before",
            "something else", "choose another folder",
        )  # fmt: skip


def _fill(folder: Path, *, work: Path, training: Training, run: Extraction) -> None:
    """Train in the folder ``work``, and save the run and its history as a new ``folder``."""
    tuned = _trained(replace(training, folder=work), run)
    fill_run(folder, tuned.model, tuned._facts())
    history = pd.DataFrame(_last(tuned)["history"])
    write_text(folder / METRICS, history.to_csv(index=False))


def _trained(training: Training, run: Extraction) -> Extraction:
    """Train, and tell in the run's facts how that went."""
    progress = training.run()
    if progress.stopped.startswith(NOT_FINITE) and progress.best == 0:
        remove_checkpoint(training.folder)  # it would come to the same again
        raise MoeeError(
            "a finite loss", progress.stopped, "lower the learning rate; the run is as it was"
        )
    if progress.best:
        _count_shares(training)
    training.student.to(next(run.model.parameters()).dtype)
    facts = [*run.provenance.get(_FACT, []), _facts(training, progress)]
    layers = moe_layers(training.student)
    reports = tuple(
        replace(layer, active_fraction=_active(layers[layer.index])) if layer.converted else layer
        for layer in run.layers
    )
    provenance = run.provenance | {_FACT: facts}
    return replace(run, model=training.student, layers=reports, provenance=provenance)


def _facts(training: Training, progress: Progress) -> dict[str, Any]:
    return {
        "key": training.key,
        "config": asdict(training.config),
        "images": training.images.name,
        "n_images": len(training.sets[0]),
        "n_held_out": len(training.sets[1]),
        "images_sha256": training.images.fingerprint,
        "contents": contents_of(training.images),
        "best": progress.best,
        "stopped": progress.stopped,
        "history": progress.rows,
    }


def _active(layer: nn.Module) -> float:
    return float(layer.shares.double() @ layer.sizes.double()) / layer.hidden_dense


@torch.no_grad()
def _count_shares(training: Training) -> None:
    """Let the layers record how often their experts are used now, on the images held out."""
    layers = moe_layers(training.student).values()
    counts = [torch.zeros_like(layer.shares, dtype=torch.float64) for layer in layers]
    tokens = [0 for _ in layers]

    def count(number: int, _router: nn.Module, _args: tuple, chosen: torch.Tensor) -> None:
        counts[number] += chosen.flatten().bincount(minlength=len(counts[number]))
        tokens[number] += len(chosen)

    with evaluating(training.student), ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hook = layer.router.register_forward_hook(partial(count, number))
            hooks.callback(hook.remove)
        for x in training.sets[1].batches(training.dense, batch_size=training.config.batch_size):
            training.student(like(x, training.student))
    for layer, counted, total in zip(layers, counts, tokens, strict=True):
        layer.shares.copy_(counted / total)
