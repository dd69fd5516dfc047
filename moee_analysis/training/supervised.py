"""Supervised training: models learn the labels of images, one by one or in processes side by side.

Models run in training mode: noise, dropout and dropped experts are part of their recipes. The store
keeps what became of them.
"""

import copy
import math
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from safetensors.torch import save_file
from timm.models import group_parameters
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.nn.functional import cross_entropy

from moee_analysis.baselines.sparse_upcycling import balance_loss, watch_routers
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating, switched
from moee_analysis.models.inputs import like, model_transform
from moee_analysis.models.loading import fingerprint
from moee_analysis.moe.layer import expert_layers
from moee_analysis.training.batches import Batch, Loaded, seeded, training_batches
from moee_analysis.training.config import SupervisedConfig
from moee_analysis.training.loop import Loop
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build, present

NORMS = ("norm2", "norm")  # names of the norm before the MLP of a block, in timm's models
HISTORY, RIGHT, WEIGHTS = "history.csv", "right.npy", "model.safetensors"
"""Files of a training: what ``train`` returns."""

_LOADED: dict[tuple, list[Loaded]] = {}  # images of the last job of this process


def parameter_groups(model: nn.Module, config: SupervisedConfig) -> list[dict[str, Any]]:
    """Groups for an optimizer: ``params`` with their names, ``weight_decay``, and ``lr_scale``.

    ``lr_scale`` is the ``layer_decay`` to the power of the number of layers above, and 1 for layers
    with experts and the norms before them, which a pretrained model does not have as they are (MoE
    Jetpack; Zhu et al., arXiv:2406.04801). What the model names in ``no_weight_decay`` has none.

    Raises ``MoeeError``: a ``layer_decay`` below 1 and a model that names no layers.
    """
    layers: dict[str, int] = {}  # of every parameter, from 0 at the images to the classifier's
    if config.layer_decay < 1:
        if not hasattr(model, "group_matcher"):
            expected, found = "a timm model, which says which layers it has", type(model).__name__
            raise MoeeError(expected, found, "leave layer_decay at 1")
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    top, new = max(layers.values(), default=0), set(_expert_parameters(model))
    spared = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        scale = 1.0 if name in new else config.layer_decay ** (top - layers.get(name, top))
        # timm's own rule looks at dimensions alone; biases of many experts have two
        decays = parameter.ndim > 1 and not name.endswith("bias") and name not in spared
        decay = {"lr_scale": scale, "weight_decay": config.weight_decay * decays}
        group = groups.setdefault((scale, decays), {"params": []} | decay)
        group["params"].append((name, parameter))
    return list(groups.values())


def _expert_parameters(model: nn.Module) -> Iterator[str]:
    """Names of the parameters of layers with experts, and of the norms before them."""
    for name, layer in expert_layers(model).items():
        yield from (f"{name}.{own}" for own, _ in layer.named_parameters())
        block = name.rpartition(".")[0]
        children = dict(model.get_submodule(block).named_children())
        norm = next((child for child in NORMS if child in children), None)
        yield from (f"{block}.{norm}.{part}".lstrip(".") for part in ("weight", "bias") if norm)


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

    - ``model``: a timm model, converted or not; all parameters of the copy learn.
    - ``images``: to train on. Who trains many models on them loads them once (:meth:`Loaded.of`).
    - ``check``: images, other than those, to look at; they influence nothing.

    Raises ``MoeeError``: a loss that is not finite; no images; a class unknown to the model.
    """
    for each in (images, check):
        if not len(each):
            raise MoeeError("at least one image", "none", "choose other images")
    learner = copy.deepcopy(model).train()
    loaded, checked = Loaded.of(images, model), Loaded.of(check, model)
    rows, right = [], []
    device = next(learner.parameters()).device
    accelerators = [] if device.type == "cpu" else [device]
    # on a CPU plain attention trains faster at few tokens than the fused one
    fused = [m for m in learner.modules() if getattr(m, "fused_attn", False)]
    plain = switched(fused, fused_attn=bool(accelerators))
    free = switched(learner.parameters(), requires_grad=True, grad=None)
    with torch.random.fork_rng(accelerators), seeded(config.seed), plain, free:
        if accelerators:
            torch.cuda.manual_seed(config.seed)
        for step, loss in _train(learner, loaded, config):
            right.append(right_of(learner, checked))
            seen, top1 = step * config.batch_size, right[-1].double().mean().item()
            row = {"step": step, "epoch": seen / len(loaded), "images": seen, "loss": loss}
            rows.append(row | {"top1": top1})
    return Trained(learner.eval(), pd.DataFrame(rows), torch.stack(right).numpy())


def _train(
    model: nn.Module, images: Loaded, config: SupervisedConfig
) -> Iterator[tuple[int, float]]:
    """Train ``model`` in place; yield the step and the mean loss whenever it is to be checked."""
    device, losses = next(model.parameters()).device, []
    loop = _make_loop(model, config)
    yield 0, math.nan
    with watch_routers(model) as routed:

        def loss_of(batch: Batch) -> tuple[torch.Tensor, float]:
            x, targets = (each.to(device) for each in batch)
            losses.append(cross_entropy(model(x).float(), targets))
            return losses[-1] + config.balance_weight * balance_loss(routed), 1

        for step, batch in enumerate(training_batches(images, model, config), start=1):
            if loop.update(step - 1, [batch], loss_of) is None:
                found = f"{losses[-1].item()} in step {step}"
                raise MoeeError("a finite loss", found, "lower the learning rate")
            losses[-1] = losses[-1].detach()
            if step == config.steps or step % (config.check_every or config.steps) == 0:
                yield step, torch.stack(losses).mean().item()
                losses.clear()


def _make_loop(model: nn.Module, config: SupervisedConfig) -> Loop:
    groups = parameter_groups(model, config)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)
    warmup = round(config.warmup * config.steps)
    scheduler = CosineLRScheduler(
        optimizer, t_initial=max(1, config.steps - 1 - warmup), lr_min=0.01 * config.learning_rate,
        warmup_t=warmup, warmup_lr_init=config.learning_rate / (warmup + 1), warmup_prefix=True,
        t_in_epochs=False, cycle_decay=0.0,  # no cycle follows; timm warns of a single step without
    )  # fmt: skip
    return Loop(list(model.parameters()), optimizer, scheduler, config.clip)


def right_of(model: nn.Module, images: ImageSet | Loaded) -> torch.Tensor:
    """Whether the model is right about each image, bool (images,); the model stays as it was."""
    loaded, size = Loaded.of(images, model), fitting_batch(model)
    with evaluating(model):
        found = [
            model(like(loaded.batch(slice(start, start + size)), model)).argmax(dim=1).cpu()
            for start in range(0, len(loaded), size)
        ]
    return torch.cat(found) == loaded.labels


@dataclass(frozen=True)
class TrainingJob:
    """A model to train by a recipe; errors call it by its name."""

    name: str
    model: nn.Module
    config: SupervisedConfig


@dataclass(frozen=True)
class TrainingBench:
    """Where jobs are done: images to train on and to evaluate, and the store of the results."""

    training: ImageSet
    images: ImageSet
    store: Path

    def all_done(self, jobs: Sequence[TrainingJob], *, workers: int = 1) -> list[Path]:
        """Do all jobs that the store does not have; return the folders of all.

        Each computes with one thread on a CPU: the same bytes with any number of processes. Raises
        ``MoeeError``: what ``train`` refuses, and the job's name.
        """
        folders = [self.folder(job) for job in jobs]
        missing = {f: job for f, job in zip(folders, jobs, strict=True) if not present(f)}
        doing = Parallel(workers, return_as="generator")(
            delayed(self.do)(job, folder) for folder, job in missing.items()
        )
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
        key = self.training, self.images, str(model_transform(job.model))
        if key not in _LOADED:
            _LOADED.clear()
            _LOADED[key] = [Loaded.of(each, job.model) for each in (self.training, self.images)]
        training, images = _LOADED[key]
        with ExitStack() as after:
            after.callback(torch.set_num_threads, torch.get_num_threads())
            torch.set_num_threads(1)
            trained = train(job.model, training, job.config, check=images)
        trained.history.to_csv(folder / HISTORY, index=False)
        np.save(folder / RIGHT, trained.right)
        save_file(trained.model.state_dict(), folder / WEIGHTS)
        write_json(folder / "config.json", asdict(job.config))
