"""Training the MLP router: from a token, which experts will be the most active?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from moee_analysis.baselines.moefication.captured_score import captured
from moee_analysis.baselines.moefication.routers import MlpRouter
from moee_analysis.errors import MoeeError

EPOCHS = 30
PATIENCE = 5  # epochs without a better one, after which there is no further one
BATCH = 512
RATE = 1e-2
HELD_OUT = 0.1  # of the images


@dataclass(frozen=True)
class Trained:
    """A router, and the share of the score that it ``captured`` on held-out tokens.

    Before the training and after each epoch; the router is that of the best.
    """

    router: MlpRouter
    captured: tuple[float, ...]


def trained(
    centres: torch.Tensor,
    inputs: torch.Tensor,
    scores: torch.Tensor,
    *,
    image: np.ndarray,
    k: int,
    seed: int = 0,
) -> Trained:
    """Train a router to find the experts of the highest scores.

    The target of an expert is its score by the largest of the batch, the loss the binary
    cross-entropy of the router's logits, minimised by Adam. Nine tenths of the images teach, the
    others choose the epoch.

    Parameters
    ----------
    centres
        Where its first weights begin, (experts, dim).
    inputs, scores
        Tokens (n, dim), and the true scores of the experts for each, (n, experts), none negative.
    image
        Image of each token, (n,).

    Raises
    ------
    MoeeError
        A single token.
    """
    teach, judge = _divided(image, seed)
    router = MlpRouter(centres.clone(), torch.eye(len(centres)).to(centres), k=k)
    best, found = copy.deepcopy(router), [_share(router, inputs[judge], scores[judge])]
    for _ in _epochs(router, inputs[teach], scores[teach], seed):
        found.append(_share(router, inputs[judge], scores[judge]))
        if found[-1] > max(found[:-1]):
            best = copy.deepcopy(router)
        if len(found) - 1 - int(np.argmax(found)) == PATIENCE:
            break
    for held in best.buffers():
        held.requires_grad_(requires_grad=False)
    return Trained(best, tuple(found))


def _epochs(
    router: MlpRouter, inputs: torch.Tensor, scores: torch.Tensor, seed: int
) -> Iterator[None]:
    """Train ``router`` in place, epoch after epoch."""
    optimizer = torch.optim.Adam([held.requires_grad_() for held in router.buffers()], lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        order = torch.randperm(len(inputs), generator=generator).to(inputs.device)
        with torch.enable_grad():
            for rows in order.split(BATCH):
                target = scores[rows]
                target = target / target.max().clamp_min(torch.finfo(target.dtype).tiny)
                optimizer.zero_grad()
                binary_cross_entropy_with_logits(router.scores(inputs[rows]), target).backward()
                optimizer.step()
        yield


def _divided(image: np.ndarray, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that teach and rows that judge; one image's are all the same, unless it is the only."""
    images = np.random.default_rng(seed).permutation(np.unique(image))
    count = max(1, round(HELD_OUT * len(images)))
    judges = np.isin(image, images[:count])
    if len(images) == 1:
        judges = np.arange(len(image)) % round(1 / HELD_OUT) == 0
    if judges.all():
        raise MoeeError(
            "two calibration tokens or more to train a router", f"{len(image)}", "use more images"
        )
    return torch.from_numpy(np.flatnonzero(~judges)), torch.from_numpy(np.flatnonzero(judges))


@torch.no_grad()
def _share(router: MlpRouter, inputs: torch.Tensor, scores: torch.Tensor) -> float:
    return captured(scores, router(inputs))
