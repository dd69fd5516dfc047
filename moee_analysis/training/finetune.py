"""Fine-tuning: a run learns to predict what its dense model predicts, its experts staying the same.

Knowledge distillation (Hinton et al., arXiv:1503.02531) without labels; AdamW, with a warm-up and a
cosine. Weights and shifts change, and routers where wanted; which hidden neurons an expert has
never does.
"""

import copy
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from moee_analysis.data.disjoint import contents_of, without_repeats
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction, load
from moee_analysis.models.capture import evaluating
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.moe.layer import counting_usage, moe_layers, moe_names
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.loop import NOT_FINITE
from moee_analysis.training.trainer import METRICS, Training, hold_checkpoint, remove_checkpoint
from moee_analysis.utils.distributed import agreed, all_sum, rank
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.folders import new_folder, scratch_folder
from moee_analysis.utils.storage.locks import locked
from moee_analysis.utils.storage.refusals import check_place
from moee_analysis.utils.storage.store import content_key, get_or_build, present, unfinished_folder

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

    - ``images``: training images; those of the calibration will do. Their labels are not used.
    - ``config``: None is the default :class:`FinetuneConfig`.
    - ``out``: folder for the fine-tuned run. It appears when the training has ended, which is not
      repeated; until then a checkpoint beside it is where one that was killed goes on.
    - ``store``: a content-keyed store that keeps the run instead. With neither nothing is kept.
    - ``weights``: the dense weights, if they have moved.

    Raises ``MoeeError``: fewer than two images; a folder that holds something else; a loss that is
    not finite before any epoch has made the model better.
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
    counts = [len(images) for images in training.sets]
    if min(counts) < 1:
        expected, found = "images to train on and others to hold out", "{} and {}".format(*counts)
        raise MoeeError(expected, found, "give more images, or another share 'held_out'")
    if out is None and store is None:
        with scratch_folder("training") as root:
            return _result(_train(replace(training, folder=root), run), run)
    folder = Path(store) / f"finetuned-{key}" if out is None else Path(out)
    _train_into(folder.resolve(), training, run, of_store=out is None)
    return _result(load(folder, dense=run.original), run)


def history_of(run: Extraction) -> pd.DataFrame:
    """Return the history of a :class:`Finetuned` run; one never fine-tuned raises ``MoeeError``."""
    return pd.DataFrame(_last(run)["history"]).astype({"loss": float})


def _last(run: Extraction) -> dict[str, Any]:
    """Facts of the run's last fine-tuning."""
    found = run.provenance.get(_FACT)
    if not found:
        raise MoeeError("a run that was fine-tuned", "one as it was extracted", "finetune it first")
    return found[-1]


def _result(tuned: Extraction, run: Extraction) -> Finetuned:
    tuned.model.to(next(run.model.parameters()).device)
    facts = _last(tuned)
    tuned = replace(tuned, original=run.original)
    return Finetuned(tuned, history_of(tuned), facts["best"], facts["stopped"])


def _train_into(folder: Path, training: Training, run: Extraction, *, of_store: bool) -> None:
    """Train, and save the run as ``folder``, unless it is there; the checkpoint is beside it.

    One process waits for another.
    """
    work, is_there = unfinished_folder(folder), present if of_store else Path.exists
    if agreed(is_there(folder)):
        _check_same(folder, training.key, run)
        with suppress(OSError), locked(work, wait=False):
            remove_checkpoint(work)  # left by a kill in the last moment
        return
    training = replace(training, folder=work)
    with hold_checkpoint(work) if rank() == 0 else nullcontext():
        all_sum(torch.zeros(1))  # none looks at the checkpoint before
        if agreed(is_there(folder)):
            _check_same(folder, training.key, run)
        elif rank() > 0:
            _train(training, run)
        elif of_store:
            get_or_build(folder.parent, folder.name, partial(_fill, training=training, run=run))
        else:
            with new_folder(folder, replace=False) as new:
                _fill(new, training=training, run=run)
        all_sum(torch.zeros(1))  # the folder is there
        if rank() == 0:
            remove_checkpoint(work)


def _check_same(folder: Path, key: str, run: Extraction) -> None:
    there = load(folder, dense=run.original) if folder.is_dir() else None
    facts = there and there.provenance.get(_FACT)
    if not facts or facts[-1]["key"] != key:
        expected = f"a new folder '{folder}', or what this fine-tuning has left there before"
        raise MoeeError(expected, "something else", "choose another folder")


def _fill(folder: Path, *, training: Training, run: Extraction) -> None:
    """Train, and save the run and its history as a new ``folder``."""
    tuned = _train(training, run)
    tuned.fill(folder)
    write_text(folder / METRICS, history_of(tuned).to_csv(index=False))


def _train(training: Training, run: Extraction) -> Extraction:
    """Train, and say in the run's facts how that went."""
    training.run()
    if training.stopped.startswith(NOT_FINITE) and training.best == 0:
        remove_checkpoint(training.folder)  # it would come to the same again
        hint = "lower the learning rate; the run is as it was"
        raise MoeeError("a finite loss", training.stopped, hint)
    if training.best:
        _count_shares(training)
    training.student.to(next(run.model.parameters()).dtype)
    facts = {
        "key": training.key,
        "config": asdict(training.config),
        "images": training.images.name,
        "n_images": len(training.sets[0]),
        "n_held_out": len(training.sets[1]),
        "images_sha256": training.images.fingerprint,
        "contents": contents_of(training.images),
        "best": training.best,
        "stopped": training.stopped,
        "history": training.rows,
    }
    reports = {report.index: report for report in run.layers}
    for index, layer in moe_layers(training.student).items():
        active = float(layer.shares.double() @ layer.sizes.double()) / layer.hidden_dense
        reports[index] = replace(reports[index], active_fraction=active)
    layers, known = tuple(reports.values()), run.provenance
    known = known | {_FACT: [*known.get(_FACT, []), facts]}
    return replace(run, model=training.student, layers=layers, provenance=known)


@torch.no_grad()
def _count_shares(training: Training) -> None:
    """Let the layers record how often their experts are used now, on the images held out."""
    student, held_out = training.student, training.sets[1]
    with evaluating(student), counting_usage({"": student}) as usage:
        for x in held_out.batches(training.dense, batch_size=training.config.batch_size):
            student(like(x, student))
    names = moe_names(student)
    for index, layer in moe_layers(student).items():
        used, k = usage[""][names[index]], round(layer.shares.sum().item())
        layer.shares.copy_(k * used / used.sum())
