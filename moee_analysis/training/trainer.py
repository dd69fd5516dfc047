"""The loop: a model is trained towards its dense model, epoch after epoch, and can be killed.

Nothing that an epoch does depends on the random state it meets: its seeds are those of the
configuration, the epoch and the image. With the weights and those of the optimizer, saved after
every epoch, a training that was killed therefore comes to the same bits.

The model runs in evaluation mode: nothing drops out, and batch norms keep their statistics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.models.evaluation_mode import in_evaluation_mode
from moee_analysis.training.augmentation import Augmented, epoch_batches, training_transform
from moee_analysis.training.checkpoints import (
    Progress,
    load_moments,
    moments,
    read_checkpoint,
    save_checkpoint,
)
from moee_analysis.training.distillation import divergences
from moee_analysis.training.distillation_loss import Losses, losses_of
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.training.train_routers import trainable_routers
from moee_analysis.utils.distributed import all_sum, own_share, sum_gradients
from moee_analysis.utils.progress import progress as shown
from moee_analysis.utils.progress import tell_progress

NOT_FINITE = "the loss was not finite"


@dataclass
class Training:
    """A ``student`` that is trained towards ``dense`` on ``images``; checkpoints go to ``folder``.

    ``key`` says which training it is. In the end the student has the weights of the best epoch.
    """

    student: nn.Module
    dense: nn.Module
    images: ImageSet
    config: FinetuneConfig
    folder: Path
    key: str
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def sets(self) -> tuple[ImageSet, ImageSet]:
        """Images to train on, and those held out."""
        held_out, rest = self.images.split(self.config.held_out, seed=self.config.seed)
        return rest, held_out

    def run(self) -> Progress:
        """Train to the end, from the last checkpoint if there is one."""
        with (
            _trainable(self.student, self.config.router),
            in_evaluation_mode(self.student),
            in_evaluation_mode(self.dense),
        ):
            self._begin()
            while not self.progress.stopped and self.progress.epochs < self.config.epochs:
                self._next()
            self.student.load_state_dict(self._best)
        return self.progress

    def _begin(self) -> None:
        """Set everything up as it was after the last whole epoch."""
        self._optimizer = create_optimizer_v2(
            self.student, "adamw", lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
        )  # fmt: skip
        warmup = round(self.config.warmup_epochs * self._steps)
        self._scheduler = CosineLRScheduler(
            self._optimizer, t_initial=self.config.epochs * self._steps, t_in_epochs=False,
            warmup_t=warmup, warmup_lr_init=self.config.learning_rate / (warmup + 1),
        )  # fmt: skip
        decay = self.config.ema
        self._ema = None if decay is None else ModelEmaV3(self.student, decay=decay)
        found = read_checkpoint(self.folder)
        if found is None:
            self._best = _copied(self.student)
            self.progress.rows.append({"epoch": 0, "steps": 0, "loss": None, **self._checked()})
            self._save()
        else:
            self._go_on(*found)

    def _go_on(self, progress: Progress, groups: dict[str, dict[str, torch.Tensor]]) -> None:
        self.progress, self._best = progress, groups["best"]
        self.student.load_state_dict(groups["student"])
        if self._ema is not None:
            self._ema.module.load_state_dict(groups["ema"])
        load_moments(self._optimizer, groups.get("optimizer", {}))
        if progress.epochs:
            tell_progress(f"going on after epoch {progress.epochs}")

    def _next(self) -> None:
        """One epoch, and what has become of the model."""
        rows, epoch = self.progress.rows, self.progress.epochs + 1
        loss = self._epoch(epoch)
        if loss is None:
            self.progress.stopped = f"{NOT_FINITE} in epoch {epoch}"
            return
        rows.append({"epoch": epoch, "steps": epoch * self._steps, "loss": loss, **self._checked()})
        if rows[-1]["kl"] < rows[self.progress.best]["kl"]:
            self.progress.best, self._best = epoch, _copied(self._kept)
        elif epoch - self.progress.best >= self.config.patience and epoch < self.config.epochs:
            self.progress.stopped = f"no lower divergence since epoch {self.progress.best}"
        tell_progress(
            f"epoch {epoch} of {self.config.epochs}: loss {loss:.4f}; held out: divergence "
            f"{rows[-1]['kl']:.4f} nats (before: {rows[0]['kl']:.4f}), agreement "
            f"{rows[-1]['agreement']:.1%}"
        )
        self._save()

    def _epoch(self, epoch: int) -> float | None:
        """Train on every image once; return the mean loss, None where it was not finite."""
        config = self.config
        transform = training_transform(self.dense, config.augmentation)
        seen = Augmented(self.sets[0], transform, config.seed, epoch)
        batches = epoch_batches(seen, config.batch_size, device=self._device)
        label = f"fine-tuning, epoch {epoch} of {config.epochs}"
        total = torch.zeros(2, dtype=torch.float64)
        with losses_of(self.student, self.dense, config) as losses:
            for step, x in enumerate(shown(batches, label=label, total=len(batches))):
                self._scheduler.step_update((epoch - 1) * self._steps + step)
                lost = self._step(x.to(self._device, non_blocking=True), losses)
                if lost is None:
                    return None
                total += lost
        return float(total[0] / total[1])

    def _step(self, x: torch.Tensor, losses: Losses) -> torch.Tensor | None:
        """One update; return the sum of losses and the number of images, of all processes."""
        self._optimizer.zero_grad(set_to_none=True)
        lost = torch.zeros(2, dtype=torch.float64)
        for part in x.chunk(self.config.accumulate):
            with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocasts):
                loss = losses(part).sum()
            loss.backward()
            lost += torch.tensor([loss.item(), len(part)], dtype=torch.float64)
        total, count = all_sum(lost).tolist()
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        sum_gradients(parameters)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.clip * count).item()
        if not (math.isfinite(norm) and math.isfinite(total)):
            return None
        torch._foreach_div_([p.grad for p in parameters if p.grad is not None], count)
        self._optimizer.step()
        if self._ema is not None:
            self._ema.update(self.student)
        return lost

    def _checked(self) -> dict[str, float]:
        """Divergence and agreement on the images held out.

        Gradients are on, as in training: without them the fastest way of computing is measured,
        and another process may find another one, and other last digits.
        """
        _, held_out = self.sets
        own = held_out.take(own_share(len(held_out)))
        sums = torch.zeros(3, dtype=torch.float64)
        batches = own.batches(self.dense, batch_size=self.config.batch_size)
        total = -(-len(own) // self.config.batch_size)
        for x in shown(batches, label="images held out", total=total):
            found = self._kept(x.to(self._device)).float().detach()
            with torch.no_grad():
                wanted = self.dense(x.to(self._device)).float()
            agree = found.argmax(dim=1) == wanted.argmax(dim=1)
            kl = divergences(found, wanted).double().sum().item()
            sums += torch.tensor([kl, agree.sum().item(), len(x)], dtype=torch.float64)
        kl, agreement, count = all_sum(sums).tolist()
        return {"kl": kl / count, "agreement": agreement / count}

    def _save(self) -> None:
        groups = {"student": self.student.state_dict(), "best": self._best}
        groups["optimizer"] = moments(self._optimizer)
        if self._ema is not None:
            groups["ema"] = self._ema.module.state_dict()
        save_checkpoint(self.folder, self.progress, groups, key=self.key)

    @property
    def _kept(self) -> nn.Module:
        """The model that is checked and kept."""
        return self.student if self._ema is None else self._ema.module

    @property
    def _device(self) -> torch.device:
        return next(self.student.parameters()).device

    @property
    def _autocasts(self) -> bool:
        return self.config.autocasts(self._device)

    @property
    def _steps(self) -> int:
        """Updates of an epoch."""
        return -(-len(self.sets[0]) // self.config.batch_size)


@contextmanager
def _trainable(model: nn.Module, router: str) -> Iterator[None]:
    """While open, all parameters of ``model`` want gradients, and those of routers that learn."""
    own = {p: p.requires_grad for p in model.parameters()}
    try:
        with nullcontext() if router == "frozen" else trainable_routers(model):
            model.requires_grad_(requires_grad=True)
            yield
    finally:
        for parameter, before in own.items():
            parameter.requires_grad_(before)
            parameter.grad = None


def _copied(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
