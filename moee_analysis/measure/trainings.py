"""Models that differ in how they start, trained by one recipe with several seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
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
) -> Trainings:
    """Train what every start makes with every seed, by one recipe.

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

    Raises
    ------
    MoeeError
        No starts or no seeds; images that are in both sets; a loss that is not finite.
    """
    _check(starts, training, images, seeds)
    like = next(iter(starts.values()))(seeds[0])
    sets = Loaded.of(training, like), Loaded.of(images, like)
    jobs = [(name, seed) for name in starts for seed in seeds]
    folders, sizes = {}, {}
    for name, seed in progress(jobs, label="trainings"):
        model, own = starts[name](seed), replace(config, seed=seed)
        folders[name, seed] = _trained(name, model, sets, own, Path(store))
        sizes.setdefault(name, _size(name, model))
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
        pd.DataFrame(sizes.values()),
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


def _trained(
    name: str,
    model: nn.Module,
    sets: tuple[Loaded, Loaded],
    config: SupervisedConfig,
    store: Path,
) -> Path:
    """Folder of a training, which is done now if it is not there."""
    training, images = (each.images.fingerprint for each in sets)
    key = content_key(
        model=fingerprint(model),
        settings=_settings(model),
        training=training,
        images=images,
        config=asdict(config),
    )
    try:
        return kept(store, f"trained-{key}", partial(_fill, model=model, sets=sets, config=config))
    except MoeeError as error:
        raise MoeeError(error.expected, f"'{name}': {error.found}", error.hint) from None


def _fill(
    folder: Path, *, model: nn.Module, sets: tuple[Loaded, Loaded], config: SupervisedConfig
) -> None:
    trained = train(model, sets[0], config, check=sets[1])
    trained.history.to_csv(folder / _HISTORY, index=False)
    np.save(folder / _RIGHT, trained.right)
    save_file(trained.model.state_dict(), folder / _WEIGHTS)
    write_json(folder / "config.json", asdict(config))


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
