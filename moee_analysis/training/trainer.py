"""A fine-tuning that can be killed: its epochs, and the checkpoint it goes on from.

Nothing that an epoch does depends on the random state it meets: its seeds are those of the
configuration, the epoch and the image. Weights and moments are saved after every epoch, so that a
training that was killed comes to the same bits. The history is a CSV beside them.

The model runs in evaluation mode: nothing drops out, and batch norms keep their statistics.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import switched
from moee_analysis.models.inputs import like
from moee_analysis.training.batches import Augmented, epoch_batches, training_transform
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.distillation import divergences, losses_of, trainable_routers
from moee_analysis.training.loop import NOT_FINITE, Loop
from moee_analysis.utils.distributed import all_sum, own_share, rank
from moee_analysis.utils.progress import progress, tell_progress
from moee_analysis.utils.storage.checksums import Tensors, read_signed_tensors, write_tensors
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.folders import held_folder
from moee_analysis.utils.storage.locks import OURS
from moee_analysis.utils.storage.store import set_aside

CHECKPOINT = "checkpoint.safetensors"
METRICS = "metrics.csv"


@dataclass
class Training:
    """A ``student`` that is trained towards ``dense`` on ``images``; checkpoints go to ``folder``.

    ``key`` says which training it is. In the end the student has the weights of the ``best`` epoch;
    ``rows`` are the history, and ``stopped`` says why it ended early, if it did.
    """

    student: nn.Module
    dense: nn.Module
    images: ImageSet
    config: FinetuneConfig
    folder: Path
    key: str
    rows: list[dict[str, Any]] = field(default_factory=list, init=False)
    best: int = field(default=0, init=False)
    stopped: str = field(default="", init=False)

    @cached_property
    def sets(self) -> tuple[ImageSet, ImageSet]:
        """Images to train on, and those held out."""
        held_out, rest = self.images.split(self.config.held_out, seed=self.config.seed)
        return rest, held_out

    @property
    def epochs(self) -> int:
        """Whole epochs that are done; the first row is of the model before any."""
        return len(self.rows) - 1

    def run(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        frozen = self.config.router == "frozen"
        with (
            switched(self.student.parameters(), requires_grad=True, grad=None),
            nullcontext() if frozen else trainable_routers(self.student),
            switched([*self.student.modules(), *self.dense.modules()], training=False),
        ):
            self._begin()
            while not self.stopped and self.epochs < self.config.epochs:
                self._next_epoch()
            self.student.load_state_dict(self._best)

    def _begin(self) -> None:
        """Set everything up as it was after the last whole epoch."""
        self._loop, decay = self._make_loop(), self.config.ema
        self._ema = None if decay is None else ModelEmaV3(self.student, decay=decay)
        facts, groups = read_checkpoint(self.folder) or ({"key": self.key}, {})
        if facts["key"] != self.key:
            expected = f"the fine-tuning that was begun in '{self.folder}'"
            hint = "repeat it as it was, remove that folder, or choose another one"
            raise MoeeError(expected, "another run, other images or other settings", hint)
        if not groups:
            self._best = copy.deepcopy(self.student.state_dict())
            self.rows.append({"epoch": 0, "steps": 0, "loss": None, **self._evaluate()})
            self._save()
            return
        self.rows, self.best, self.stopped = facts["rows"], facts["best"], facts["stopped"]
        self._best = groups["best"]
        self.student.load_state_dict(groups["student"])
        if self._ema is not None:
            self._ema.module.load_state_dict(groups["ema"])
        optimizer = self._loop.optimizer
        moments = {int(p): own for p, own in _nest(groups.get("optimizer", {}), ".").items()}
        optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
        if self.epochs:
            tell_progress(f"going on after epoch {self.epochs}")

    def _make_loop(self) -> Loop:
        config = self.config
        rate, decay = config.learning_rate, config.weight_decay
        optimizer = create_optimizer_v2(self.student, "adamw", lr=rate, weight_decay=decay)
        warmup = round(config.warmup_epochs * self._steps)
        scheduler = CosineLRScheduler(
            optimizer, t_initial=config.epochs * self._steps, t_in_epochs=False, warmup_t=warmup,
            warmup_lr_init=rate / (warmup + 1),
        )  # fmt: skip
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        return Loop(parameters, optimizer, scheduler, config.clip)

    def _next_epoch(self) -> None:
        epoch, last = self.epochs + 1, self.config.epochs
        loss = self._train_epoch(epoch)
        if loss is None:
            self.stopped = f"{NOT_FINITE} in epoch {epoch}"
            return
        row = {"epoch": epoch, "steps": epoch * self._steps, "loss": loss, **self._evaluate()}
        self.rows.append(row)
        if row["kl"] < self.rows[self.best]["kl"]:
            self.best, self._best = epoch, copy.deepcopy(self._model.state_dict())
        elif epoch - self.best >= self.config.patience and epoch < last:
            self.stopped = f"no lower divergence since epoch {self.best}"
        tell_progress(
            f"epoch {epoch} of {last}: loss {loss:.4f}; held out: divergence {row['kl']:.4f} nats "
            f"(before: {self.rows[0]['kl']:.4f}), agreement {row['agreement']:.1%}"
        )
        self._save()

    def _train_epoch(self, epoch: int) -> float | None:
        """Train on every image once; return the mean loss, None where it was not finite."""
        config, device = self.config, next(self.student.parameters()).device
        transform = training_transform(self.dense, config.augmentation)
        seen = Augmented(self.sets[0], transform, config.seed, epoch)
        batches = epoch_batches(seen, config.batch_size, device=device)
        label = f"fine-tuning, epoch {epoch} of {config.epochs}"
        in_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        if config.precision != "auto":
            in_bfloat16 = config.precision == "bfloat16"
        total, images = 0.0, 0.0
        with losses_of(self.student, self.dense, config) as losses:

            def loss_of(part: torch.Tensor) -> tuple[torch.Tensor, float]:
                with torch.autocast(device.type, torch.bfloat16, enabled=in_bfloat16):
                    return losses(part).sum(), len(part)

            for step, x in enumerate(progress(batches, label=label, total=len(batches))):
                parts = x.to(device, non_blocking=True).chunk(config.accumulate)
                found = self._loop.update((epoch - 1) * self._steps + step, parts, loss_of)
                if found is None:
                    return None
                total, images = total + found[0], images + found[1]
                if self._ema is not None:
                    self._ema.update(self.student)
        return total / images

    def _evaluate(self) -> dict[str, float]:
        """Divergence and agreement on the images held out."""
        own = self.sets[1].take(own_share(len(self.sets[1])))
        sums = torch.zeros(2, dtype=torch.float64)
        batches = own.batches(self.dense, batch_size=self.config.batch_size)
        total = -(-len(own) // self.config.batch_size)
        for batch in progress(batches, label="images held out", total=total):
            x = like(batch, self.student)
            # gradients are on, as in training: without them the fastest way of computing is
            # measured, and another process may find another one, and other last digits
            found = self._model(x).float().detach()
            with torch.no_grad():
                wanted = self.dense(x).float()
            agree = found.argmax(dim=1) == wanted.argmax(dim=1)
            kl = divergences(found, wanted).double().sum().item()
            sums += torch.tensor([kl, agree.sum().item()], dtype=torch.float64)
        kl, agreement = (all_sum(sums) / len(self.sets[1])).tolist()
        return {"kl": kl, "agreement": agreement}

    def _save(self) -> None:
        """Save the checkpoint, and the history beside it, by the first of several processes."""
        if rank() == 0:
            state = self._loop.optimizer.state_dict()["state"]  # by the parameter's number
            groups = {"student": self.student.state_dict(), "best": self._best}
            groups["optimizer"] = {
                f"{p}.{name}": t for p, own in state.items() for name, t in own.items()
            }
            if self._ema is not None:
                groups["ema"] = self._ema.module.state_dict()
            copies = {  # a weight with several names is several tensors of the file
                f"{group}/{name}": t.detach().clone(memory_format=torch.contiguous_format).cpu()
                for group, own in groups.items()
                for name, t in own.items()
            }
            facts = {name: getattr(self, name) for name in ("key", "rows", "best", "stopped")}
            write_tensors(self.folder / CHECKPOINT, copies, facts)
            write_text(self.folder / METRICS, pd.DataFrame(self.rows).to_csv(index=False))
        all_sum(torch.zeros(1))  # none goes on before it is there

    @property
    def _model(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.student if self._ema is None else self._ema.module

    @property
    def _steps(self) -> int:
        """Updates of an epoch."""
        return -(-len(self.sets[0]) // self.config.batch_size)


def read_checkpoint(folder: Path) -> tuple[dict[str, Any], dict[str, Tensors]] | None:
    """Return what was saved last in ``folder``, if anything was; a damaged one raises MoeeError."""
    if not any((folder / name).exists() for name in (CHECKPOINT, METRICS)):
        return None
    tensors, facts = read_signed_tensors(folder / CHECKPOINT)
    return facts, _nest(tensors, "/")


def remove_checkpoint(folder: Path) -> None:
    """Remove the files of a checkpoint, and the folder if nothing else is in it."""
    for pattern in (METRICS, "checkpoint*", f".*{OURS}*"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


@contextmanager
def hold_checkpoint(folder: Path) -> Iterator[None]:
    """Hold the folder of a checkpoint; a damaged one is set aside, an empty one goes in the end."""
    with held_folder(folder):
        try:
            read_checkpoint(folder)
        except MoeeError as damage:
            set_aside(folder, damage.found, seen=folder.lstat())
    with held_folder(folder):  # made anew where it was
        try:
            yield
        finally:
            if not (folder / CHECKPOINT).exists():
                remove_checkpoint(folder)


def _nest(tensors: Tensors, separator: str) -> dict[str, Tensors]:
    """Tensors by the part of their name before the ``separator``, then by the rest."""
    groups: dict[str, Tensors] = {}
    for name, tensor in tensors.items():
        group, _, own = name.partition(separator)
        groups.setdefault(group, {})[own] = tensor
    return groups
