"""Train the bundled model: ``python -m moee_analysis.scenes_training`` fills ``data/``.

A small vision transformer learns the rendered scenes from scratch on a CPU within the hour.
Three things make that possible, and a fourth makes the outcome useful:

- A second, temporary head says which parts each patch shows, so that a picture teaches with
  every token (token labelling; Jiang et al. 2021, arXiv 2104.10858).
- For most of the epochs the model sees a random half of the patches of each picture, for half
  the time (Li et al. 2023, arXiv 2212.00794); in the last it sees them all.
- Muon updates the matrices of the blocks (Jordan et al. 2024), AdamW everything else.
- In the later epochs the hidden neurons' input weights are held at about one length, so that
  no neuron idles and compression shows (see `even_out`).
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional

from moee_analysis.paths import data_folder
from moee_analysis.progress import progress
from moee_analysis.scenes import CLASSES, SPLIT_SEEDS, SPLIT_SIZES
from moee_analysis.scenes_drawing import PARTS, SIDE
from moee_analysis.scenes_evaluation import (
    GRID,
    PATCH,
    Pictures,
    half_pruned,
    normalised,
    per_class,
    rendered,
    top1,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

ARCHITECTURE: dict[str, object] = {
    "img_size": SIDE,
    "patch_size": PATCH,
    "embed_dim": 64,
    "depth": 12,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "num_classes": len(CLASSES),
}
"""Arguments of timm's `VisionTransformer` that rebuild the bundled model."""


@dataclass(frozen=True)
class Recipe:
    """Everything the training depends on; the defaults made the bundled model."""

    epochs: int = 12
    whole_epochs: int = 2
    seed: int = 0
    train_images: int = SPLIT_SIZES["train"]
    evaluation_images: int = SPLIT_SIZES["evaluation"]
    calibration_images: int = SPLIT_SIZES["calibration"]
    batch_size: int = 96
    muon_rate: float = 2.5e-3
    adamw_rate: float = 1.2e-3
    weight_decay: float = 0.05
    warmup_epochs: float = 0.2
    cooldown_epochs: int = 4
    label_smoothing: float = 0.05
    part_weight: float = 1.0
    free_epochs: int = 7
    patches_seen: int = GRID * GRID // 2
    gradient_norm: float = 1.0


def build() -> VisionTransformer:
    """An untrained model, with the attention that trains fastest at 65 tokens on a CPU."""
    model = VisionTransformer(**ARCHITECTURE)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def logits(model: VisionTransformer, x: torch.Tensor, seen: torch.Tensor) -> tuple:
    """Forward pass over some of the patches.

    Parameters
    ----------
    model
        With class token and position embedding.
    x
        Normalised pictures, float [n, 3, 64, 64].
    seen
        Indices of each picture's patches, int64 [n, patches].

    Returns
    -------
    tuple of torch.Tensor
        Class logits [n, classes] and the patches' final tokens [n, patches, dim].
    """
    tokens = model._pos_embed(model.patch_embed(x))
    seen = seen[..., None].expand(-1, -1, tokens.shape[-1])
    tokens = torch.cat([tokens[:, :1], tokens[:, 1:].gather(1, seen)], 1)
    tokens = model.norm(model.blocks(tokens))
    return model.head(tokens[:, 0]), tokens[:, 1:]


def mirrored(x: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mirror each picture and its part counts with probability one half."""
    chosen = torch.rand(len(x)) < 0.5
    x = torch.where(chosen[:, None, None, None], x.flip(3), x)
    grid = parts.unflatten(1, (GRID, GRID))
    grid = torch.where(chosen[:, None, None, None], grid.flip(2), grid)
    return x, grid.flatten(1, 2)


def rate(epoch: float, recipe: Recipe) -> float:
    """Share of the full learning rates: a short warm-up, a plateau, a straight line to zero."""
    rising = (epoch + 1e-3) / recipe.warmup_epochs
    falling = (recipe.epochs - epoch) / recipe.cooldown_epochs
    return min(1.0, rising, falling)


def optimisers(
    model: nn.Module, part_head: nn.Module, recipe: Recipe
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [w for w in model.blocks.parameters() if w.ndim == 2]
    named = {id(w) for w in matrices}
    rest = [w for w in (*model.parameters(), *part_head.parameters()) if id(w) not in named]
    return [
        torch.optim.Muon(
            matrices,
            lr=recipe.muon_rate,
            weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]


@torch.no_grad()
def even_out(model: VisionTransformer, pull: float = 0.05) -> None:
    """Draw the input weights of each layer's hidden neurons towards a common length.

    Left alone, the lengths spread by a third around their mean and the short neurons do little.
    A model loses those without harm, and could not tell a good compression from a bad one.
    """
    for block in model.blocks:
        rows = block.mlp.fc1.weight
        lengths = rows.norm(dim=1, keepdim=True)
        rows.mul_((lengths.mean() / lengths) ** pull)


def train(recipe: Recipe, pictures: Pictures, check: Pictures) -> VisionTransformer:
    """Train a model from scratch.

    Parameters
    ----------
    recipe
        What to do; its seed covers initial weights, order and augmentation.
    pictures
        Training set.
    check
        Scenes whose top-1 is told after each epoch; they influence nothing.
    """
    torch.manual_seed(recipe.seed)
    training = Training(recipe, build())
    for epoch in progress(range(recipe.epochs), label="training"):
        loss = training.epoch(epoch, pictures)
        reached = top1(training.model, check)
        print(f" epoch {epoch + 1}: loss {loss:.3f}, top-1 {reached:.3f}", file=sys.stderr)
    return training.model.eval()


@dataclass
class Training:
    """A model in training, with what is thrown away afterwards: part head and optimisers."""

    recipe: Recipe
    model: VisionTransformer
    part_head: nn.Linear = field(init=False)
    optimisers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.part_head = nn.Linear(self.model.embed_dim, len(PARTS))
        self.optimisers = optimisers(self.model, self.part_head, self.recipe)
        self._rates = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]

    def epoch(self, epoch: int, pictures: Pictures) -> float:
        """One pass over the pictures in a new order; returns the mean loss."""
        self.model.train()
        whole = epoch >= self.recipe.epochs - self.recipe.whole_epochs
        batches = torch.randperm(len(pictures)).split(self.recipe.batch_size)
        total = 0.0
        for step, chosen in enumerate(batches):
            self._set_rates(rate(epoch + step / len(batches), self.recipe))
            total += self._step(pictures, chosen, GRID**2 if whole else self.recipe.patches_seen)
            if epoch >= self.recipe.free_epochs:
                even_out(self.model)
        return total / len(batches)

    def _set_rates(self, share: float) -> None:
        for optimiser, full in zip(self.optimisers, self._rates, strict=True):
            optimiser.param_groups[0]["lr"] = full * share

    def _step(self, pictures: Pictures, chosen: torch.Tensor, patches: int) -> float:
        """One step on the chosen pictures, ``patches`` of each in sight; returns the loss."""
        x, parts = mirrored(normalised(pictures.images[chosen]), pictures.parts[chosen])
        seen = torch.rand(len(x), GRID**2).argsort(1)[:, :patches]
        loss = self._loss(x, seen, (pictures.labels[chosen], parts))
        for optimiser in self.optimisers:
            optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.gradient_norm)
        for optimiser in self.optimisers:
            optimiser.step()
        return loss.item()

    def _loss(self, x: torch.Tensor, seen: torch.Tensor, truth: tuple) -> torch.Tensor:
        """Cross-entropy of the class and, weighted, of the parts in each patch in sight."""
        labels, parts = truth
        with torch.autocast("cpu", torch.bfloat16):
            classes, tokens = logits(self.model, x, seen)
            found = self.part_head(tokens)
        shares = parts.gather(1, seen[..., None].expand(-1, -1, len(PARTS))).float() / PATCH**2
        smoothing = self.recipe.label_smoothing
        loss = functional.cross_entropy(classes.float(), labels, label_smoothing=smoothing)
        in_patches = functional.cross_entropy(found.float().flatten(0, 1), shares.flatten(0, 1))
        return loss + self.recipe.part_weight * in_patches


def accuracy(
    model: VisionTransformer, train_set: Pictures, evaluation: Pictures, calibration: Pictures
) -> dict[str, object]:
    """The card's section on accuracy."""
    with half_pruned(model, calibration):
        pruned = top1(model, evaluation)
    return {
        "top1_evaluation": round(top1(model, evaluation), 4),
        "top1_train": round(top1(model, train_set.first(len(evaluation))), 4),
        "top1_half_pruned": round(pruned, 4),
        "per_class": per_class(model, evaluation),
    }


def card(recipe: Recipe, scores: dict[str, object], *, minutes: float, command: str) -> dict:
    """The model card, ready for JSON."""
    return {
        "format": 1,
        "name": "bundled",
        "architecture": "vision_transformer",
        "kwargs": ARCHITECTURE,
        "pretrained_cfg": _pretrained_cfg(),
        "data": {
            "seeds": SPLIT_SEEDS,
            "train_images": recipe.train_images,
            "evaluation_images": recipe.evaluation_images,
            "calibration_images": recipe.calibration_images,
        },
        "training": {"command": command, "minutes": round(minutes, 1), **asdict(recipe)},
        "accuracy": scores,
        "versions": _versions(),
    }


def _pretrained_cfg() -> dict[str, object]:
    return {
        "architecture": "bundled",
        "input_size": [3, SIDE, SIDE],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "num_classes": len(CLASSES),
        "label_names": list(CLASSES),
        "classifier": "head",
        "first_conv": "patch_embed.proj",
    }


def _versions() -> dict[str, str]:
    packages = {name: version(name) for name in ("torch", "timm", "numpy", "pillow")}
    return {"python": platform.python_version(), **packages}


def write(folder: Path, model: nn.Module, model_card: dict[str, object]) -> None:
    """Write ``bundled.safetensors`` and ``bundled.json``, each complete or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(model_card, indent=2) + "\n"
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    _replace(folder / "bundled.safetensors", save(weights))
    _replace(folder / "bundled.json", text.encode())


def _replace(path: Path, content: bytes) -> None:
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def make(recipe: Recipe, folder: Path, *, command: str) -> dict[str, object]:
    """Render, train, evaluate and write both files; returns the card."""
    start = time.monotonic()
    pictures = rendered("train", recipe.train_images)
    calibration = rendered("calibration", recipe.calibration_images)
    model = train(recipe, pictures, calibration.first(1000))
    minutes = (time.monotonic() - start) / 60
    evaluation = rendered("evaluation", recipe.evaluation_images)
    scores = accuracy(model, pictures, evaluation, calibration)
    model_card = card(recipe, scores, minutes=minutes, command=command)
    write(folder, model, model_card)
    return model_card


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: options for a shorter run, another seed or another folder."""
    parser = argparse.ArgumentParser(
        prog="python -m moee_analysis.scenes_training", description="Train the bundled model."
    )
    parser.add_argument("--epochs", type=int, default=Recipe.epochs)
    parser.add_argument("--train-images", type=int, default=Recipe.train_images)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (data/)")
    options = parser.parse_args(arguments)
    recipe = Recipe(epochs=options.epochs, train_images=options.train_images, seed=options.seed)
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["python -m moee_analysis.scenes_training", *given])
    model_card = make(recipe, options.out or data_folder(), command=command)
    print(json.dumps(model_card["accuracy"], indent=2))


if __name__ == "__main__":
    main()
