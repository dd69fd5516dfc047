"""How good a model of the scenes is, and whether the task is hard enough to tell models apart."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import nn

from moee_analysis.data.scenes.canvas import PARTS, SIDE
from moee_analysis.data.scenes.scene import CLASSES, SPLIT_SEEDS, render
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from moee_analysis.utils.progress import progress

PATCH = 8
GRID = SIDE // PATCH
_ROWS, _COLUMNS = np.indices((SIDE, SIDE)) // PATCH
_PATCH_STARTS = (_ROWS * GRID + _COLUMNS) * len(PARTS)


@dataclass(frozen=True)
class Pictures:
    """Rendered scenes in memory.

    ``images`` uint8 [n, 64, 64, 3], ``labels`` int64 [n], indices into `CLASSES`; ``parts`` uint8
    [n, 64, parts]: in each 8 x 8 patch, row by row, how many pixels show each part.
    """

    images: torch.Tensor
    labels: torch.Tensor
    parts: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, count: int) -> Self:
        """The first ``count`` of them."""
        return Pictures(self.images[:count], self.labels[:count], self.parts[:count])


def render_split(split: str, count: int) -> Pictures:
    """Render the first ``count`` scenes of a split."""
    seed, numbers = SPLIT_SEEDS[split], progress(range(count), label=f"rendering {split}")
    scenes = [render(seed, n) for n in numbers]
    return Pictures(
        torch.from_numpy(np.stack([each.image for each in scenes])),
        torch.tensor([each.label for each in scenes]),
        torch.from_numpy(np.stack([part_counts(each.parts) for each in scenes]).astype(np.uint8)),
    )


def part_counts(mask: np.ndarray) -> np.ndarray:
    """Pixels of each part in each patch of a part mask, [64, parts]."""
    counts = np.bincount((_PATCH_STARTS + mask).ravel(), minlength=GRID * GRID * len(PARTS))
    return counts.reshape(GRID * GRID, len(PARTS))


def normalise(images: torch.Tensor) -> torch.Tensor:
    """Pictures as the model takes them: float [n, 3, 64, 64], -1 to 1."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def predictions(model: nn.Module, pictures: Pictures) -> torch.Tensor:
    """Predicted class of each picture, int64 [n]."""
    model.eval()
    batches = pictures.images.split(250)
    return torch.cat([model(normalise(batch)).argmax(1) for batch in batches])


def top1(model: nn.Module, pictures: Pictures) -> float:
    """Share of the pictures whose predicted class is right."""
    return (predictions(model, pictures) == pictures.labels).double().mean().item()


def per_class(model: nn.Module, pictures: Pictures) -> dict[str, float]:
    """Top-1 of each class."""
    right = predictions(model, pictures) == pictures.labels
    return {
        CLASSES[index]: round(right[pictures.labels == index].double().mean().item(), 4)
        for index in pictures.labels.unique().tolist()
    }


def hidden_variances(model: nn.Module, pictures: Pictures) -> list[torch.Tensor]:
    """Variance of each hidden neuron's activation over all tokens, one float64 [hidden] a layer."""
    moments = [torch.zeros(3, 1, dtype=torch.float64) for _ in find_mlps(model)]

    def add(layer: int, hidden: torch.Tensor) -> None:
        a = hidden.flatten(0, -2).double()
        batch = (torch.full_like(a[0], len(a)), a.sum(0), a.square().sum(0))
        moments[layer] = moments[layer] + torch.stack(batch)

    with watch(_activations(model), add, "outputs"):
        predictions(model, pictures)
    return [squares / n - (total / n) ** 2 for n, total, squares in moments]


@contextmanager
def half_pruned(model: nn.Module, calibration: Pictures) -> Iterator[None]:
    """Silence the half of the hidden neurons of every layer that varies least: is the task hard?

    A model that hardly suffers could not tell a good compression from a bad one.
    """
    variances = hidden_variances(model, calibration)
    kept = [v.argsort(descending=True)[: len(v) // 2] for v in variances]
    keep = [torch.zeros(len(v)).scatter(0, n, 1.0) for v, n in zip(variances, kept, strict=True)]
    with watch(_activations(model), lambda layer, hidden: hidden * keep[layer], "outputs"):
        yield


def _activations(model: nn.Module) -> dict[int, nn.Module]:
    return {layer: site.module(model).act for layer, site in enumerate(find_mlps(model))}
