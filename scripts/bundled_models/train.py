"""Train a bundled model: ``python -m scripts.bundled_models.train`` fills ``data/``.

A small network of timm's learns the rendered scenes from scratch on a CPU within the hour. Three
things make that possible, and a fourth makes the outcome useful:

- A second, temporary head says which parts each patch shows, so that a picture teaches with
  every token (token labelling; Jiang et al. 2021, arXiv 2104.10858).
- For most of the epochs a vision transformer sees a random half of the patches of each picture,
  for half the time (Li et al. 2023, arXiv 2212.00794); in the last it sees them all. Models in
  stages, whose tokens need their neighbours, always do.
- Muon updates the matrices of the blocks (Jordan et al. 2024), AdamW everything else.
- In the later epochs the hidden neurons' input weights are held at about one length, so that
  no neuron idles and compression shows (see `even_out`).
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from moee_analysis.data.scenes.canvas import PARTS
from moee_analysis.models.loading import BUNDLED, BUNDLED_MODELS, find_mlps
from moee_analysis.utils.environment import own_folder
from moee_analysis.utils.progress import progress
from scripts.bundled_models.architectures import RECIPES, Recipe, build, logits, patch_width
from scripts.bundled_models.evaluation import GRID, PATCH, Pictures, normalise, render_split, top1
from scripts.bundled_models.model_card import accuracy, card, write

OPTIONS = ("epochs", "train_images", "evaluation_images", "calibration_images", "seed")


def mirror(x: torch.Tensor, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
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
    """Muon for the matrices of the linear layers but the classifier's, AdamW for the rest."""
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    matrices = [m.weight for m in linear if m is not model.get_classifier()]
    named = {id(w) for w in matrices}
    rest = [w for w in (*model.parameters(), *part_head.parameters()) if id(w) not in named]
    return [
        torch.optim.Muon(
            matrices, lr=recipe.muon_rate, weight_decay=recipe.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            rest, lr=recipe.adamw_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True
        ),
    ]  # fmt: skip


@torch.no_grad()
def even_out(model: nn.Module, pull: float = 0.05) -> None:
    """Draw the input weights of each layer's hidden neurons towards a common length.

    Left alone, the lengths spread by a third around their mean and the short neurons do little.
    A model loses those without harm, and could not tell a good compression from a bad one.
    """
    for site in find_mlps(model):
        rows = site.module(model).fc1.weight
        lengths = rows.norm(dim=1, keepdim=True)
        rows.mul_((lengths.mean() / lengths) ** pull)


def train(name: str, recipe: Recipe, pictures: Pictures, check: Pictures) -> nn.Module:
    """Train a bundled architecture from scratch; tell its top-1 on ``check`` after each epoch.

    The seed of the ``recipe`` covers initial weights, order and augmentation.
    """
    torch.manual_seed(recipe.seed)
    training = Training(recipe, build(name))
    for epoch in progress(range(recipe.epochs), label="training"):
        loss = training.epoch(epoch, pictures)
        reached = top1(training.model, check)
        print(f" epoch {epoch + 1}: loss {loss:.3f}, top-1 {reached:.3f}", file=sys.stderr)
    return training.model.eval()


@dataclass
class Training:
    """A model in training, with what is thrown away afterwards: part head and optimisers."""

    recipe: Recipe
    model: nn.Module
    part_head: nn.Linear = field(init=False)
    optimisers: list[torch.optim.Optimizer] = field(init=False)

    def __post_init__(self) -> None:
        self.part_head = nn.Linear(patch_width(self.model), len(PARTS))
        self.optimisers = optimisers(self.model, self.part_head, self.recipe)
        self._rates = [optimiser.param_groups[0]["lr"] for optimiser in self.optimisers]

    def epoch(self, epoch: int, pictures: Pictures) -> float:
        """One pass over the pictures in a new order; returns the mean loss."""
        self.model.train()
        whole = epoch >= self.recipe.epochs - self.recipe.whole_epochs
        batches = torch.randperm(len(pictures)).split(self.recipe.batch_size)
        total = 0.0
        for step, chosen in enumerate(batches):
            share = rate(epoch + step / len(batches), self.recipe)
            for optimiser, full in zip(self.optimisers, self._rates, strict=True):
                optimiser.param_groups[0]["lr"] = full * share
            total += self._step(pictures, chosen, GRID**2 if whole else self.recipe.patches_seen)
            if epoch >= self.recipe.free_epochs:
                even_out(self.model)
        return total / len(batches)

    def _step(self, pictures: Pictures, chosen: torch.Tensor, patches: int) -> float:
        """One step on the chosen pictures, ``patches`` of each in sight; returns the loss."""
        x, parts = mirror(normalise(pictures.images[chosen]), pictures.parts[chosen])
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
        loss = cross_entropy(classes.float(), labels, label_smoothing=smoothing)
        in_patches = cross_entropy(found.float().flatten(0, 1), shares.flatten(0, 1))
        return loss + self.recipe.part_weight * in_patches


def make(name: str, recipe: Recipe, folder: Path, *, command: str) -> dict[str, object]:
    """Render, train, evaluate and write both files; returns the card."""
    start = time.process_time()  # of one core, however busy the machine is with other work
    pictures = render_split("train", recipe.train_images)
    calibration = render_split("calibration", recipe.calibration_images)
    model = train(name, recipe, pictures, calibration.first(1000))
    minutes = (time.process_time() - start) / 60
    evaluation = render_split("evaluation", recipe.evaluation_images)
    scores = accuracy(model, pictures, evaluation, calibration)
    model_card = card(name, recipe, scores, minutes=minutes, command=command)
    write(folder, model, model_card)
    return model_card


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: another model, a shorter run, another seed, another folder."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.bundled_models.train", description="Train a bundled model."
    )
    parser.add_argument("--model", choices=BUNDLED_MODELS, default=BUNDLED)
    for name in OPTIONS:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=None, help="folder to write to (data/)")
    options = parser.parse_args(arguments)
    changed = {name: value for name, value in vars(options).items() if name in OPTIONS}
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = " ".join(["python -m scripts.bundled_models.train", *given])
    recipe = replace(RECIPES[options.model], **changed)
    model_card = make(options.model, recipe, options.out or own_folder("data"), command=command)
    print(json.dumps(model_card["accuracy"], indent=2))


if __name__ == "__main__":
    main()
