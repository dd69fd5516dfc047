"""Supervised training: any model learns the labels of images, by cross-entropy.

Models run in training mode: noise, dropout and dropped experts are part of their recipes.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moee_analysis.baselines.common.balance_losses import balance_loss, routed_by
from moee_analysis.baselines.common.sparse_routers import Routed
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.training.augmentation import seeded
from moee_analysis.training.batches import Batches, Loaded
from moee_analysis.training.parameter_groups import parameter_groups
from moee_analysis.training.supervised_config import SupervisedConfig


@dataclass(frozen=True)
class Trained:
    """A trained model, in evaluation mode, and how it came about.

    ``history`` has a row for each look at the images to check, the first before any training:
    ``step`` (updates so far), ``epoch`` (passes over the training images, a fraction), ``images``
    (seen so far), ``loss`` (mean since the last row, nan in the first) and ``top1`` (a share).
    ``right`` says of each row and image whether the model was right, bool (rows, images).
    """

    model: nn.Module
    history: pd.DataFrame
    right: np.ndarray


def train(
    model: nn.Module,
    images: ImageSet | Loaded,
    config: SupervisedConfig,
    *,
    check: ImageSet | Loaded,
) -> Trained:
    """Train a copy of ``model`` on the labels of ``images``; the same bytes each time on a CPU.

    Parameters
    ----------
    model
        A timm model, converted or not; all parameters of the copy learn.
    images
        To train on. Who trains many models on them loads them once (:meth:`Loaded.of`).
    check
        Images, other than those, whose top-1 is told; they influence nothing.

    Raises
    ------
    MoeeError
        A loss that is not finite; no images; a class that the model does not know.
    """
    for each in (images, check):
        if not len(each):
            raise MoeeError("at least one image", "none", "choose other images")
    learner = copy.deepcopy(model).requires_grad_(requires_grad=True).train()
    sets = Loaded.of(images, model), Loaded.of(check, model)
    device = next(learner.parameters()).device
    training = _Training(learner, *sets, config)
    with (
        _all_seeded(config.seed, device),
        quick_attention(learner),
        routed_by(learner) as routed,
    ):
        rows = training.run(routed)
    learner.zero_grad(set_to_none=True)
    for own, copied in zip(model.parameters(), learner.parameters(), strict=True):
        copied.requires_grad_(own.requires_grad)
    right = torch.stack(training.right).numpy()
    return Trained(learner.eval(), pd.DataFrame(rows), right)


@dataclass
class _Training:
    """A ``model`` that learns, in place."""

    model: nn.Module
    images: Loaded
    check: Loaded
    config: SupervisedConfig
    optimizer: torch.optim.Optimizer = field(init=False)
    right: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups = parameter_groups(
            self.model,
            weight_decay=self.config.weight_decay,
            layer_decay=self.config.layer_decay,
        )
        parts = [{k: v for k, v in group.items() if k != "names"} for group in groups]
        self.optimizer = torch.optim.AdamW(parts, lr=self.config.learning_rate, fused=True)

    def run(self, routed: Mapping[str, Routed]) -> list[dict[str, float]]:
        """Make all updates; return the rows of the history. Routers leave ``routed`` behind."""
        rows, losses = [self._row(0, [])], []
        for step, (x, targets) in enumerate(Batches(self.images, self.model, self.config), start=1):
            self._set_rates(step - 1)
            losses.append(self._update(x, targets, routed))
            if self.config.checked(step):
                rows.append(self._row(step, losses))
                losses = []
        return rows

    def _set_rates(self, step: int) -> None:
        rate = self.config.learning_rate * self.config.share(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["scale"]

    def _update(
        self, x: torch.Tensor, targets: torch.Tensor, routed: Mapping[str, Routed]
    ) -> torch.Tensor:
        """One update; return the cross-entropy."""
        device = next(self.model.parameters()).device
        loss = cross_entropy(self.model(x.to(device)).float(), targets.to(device))
        self.optimizer.zero_grad(set_to_none=True)
        (loss + self.config.balance_weight * balance_loss(self.model, routed)).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        return loss.detach()

    def _row(self, step: int, losses: list[torch.Tensor]) -> dict[str, float]:
        mean = torch.stack(losses).mean().item() if losses else math.nan
        if losses and not math.isfinite(mean):
            raise MoeeError("a finite loss", f"{mean} up to step {step}", "lower the learning rate")
        seen = step * self.config.batch_size
        self.right.append(right_of(self.model, self.check))
        return {
            "step": step,
            "epoch": seen / len(self.images),
            "images": seen,
            "loss": mean,
            "top1": self.right[-1].double().mean().item(),
        }


def right_of(model: nn.Module, images: ImageSet | Loaded) -> torch.Tensor:
    """Whether the model is right about each image, bool (images,); the model stays as it was."""
    loaded = Loaded.of(images, model)
    device, size = next(model.parameters()).device, fitting_batch(model)
    with evaluating(model):
        found = [
            model(loaded.batch(slice(start, start + size)).to(device)).argmax(dim=1).cpu()
            for start in range(0, len(loaded), size)
        ]
    return torch.cat(found) == loaded.labels


@contextmanager
def quick_attention(model: nn.Module) -> Iterator[None]:
    """Plain attention on a CPU, where it trains faster at few tokens than the fused one."""
    fused = [m for m in model.modules() if getattr(m, "fused_attn", False)]
    plain = next(model.parameters()).device.type == "cpu"
    try:
        for module in fused:
            module.fused_attn = not plain
        yield
    finally:
        for module in fused:
            module.fused_attn = True


@contextmanager
def _all_seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the random states of the CPU and of ``device``; all are given back at the end."""
    accelerators = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(accelerators, enabled=bool(accelerators)), seeded(seed):
        if accelerators:
            torch.cuda.manual_seed(seed)
        yield
