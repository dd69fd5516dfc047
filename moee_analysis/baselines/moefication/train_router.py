"""Training the MLP router: from a token, which experts will be the most active?"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import binary_cross_entropy_with_logits

from moee_analysis.baselines.moefication.routers import MlpRouter
from moee_analysis.errors import MoeeError

EPOCHS = 30
PATIENCE = 5  # epochs without a better one, after which there is no further one
BATCH = 512
RATE = 1e-2
HELD_OUT = 0.1  # of the images


class Trained(NamedTuple):
    """A router, and the share of the score that it ``captured`` on held-out tokens.

    Before the training and after each epoch; the router is that of the best.
    """

    router: MlpRouter
    captured: tuple[float, ...]


def train_router(
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
    judges = _choose_judges(image, seed)
    teach, judge = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~judges, judges))
    router = MlpRouter(centres.clone(), torch.eye(len(centres)).to(centres), k=k)
    best, found = copy.deepcopy(router), [captured(scores[judge], router(inputs[judge]))]
    for _ in _epochs(router, inputs[teach], scores[teach], seed):
        with torch.no_grad():
            found.append(captured(scores[judge], router(inputs[judge])))
        if found[-1] > max(found[:-1]):
            best = copy.deepcopy(router)
        if len(found) - 1 - int(np.argmax(found)) == PATIENCE:
            break
    for weights in best.buffers():
        weights.requires_grad_(requires_grad=False)
    return Trained(best, tuple(found))


def captured(scores: torch.Tensor, chosen: torch.Tensor) -> float:
    """Mean over tokens of the share of all ``scores`` that the ``chosen`` experts have.

    ``scores`` (n, experts) are none of them negative, ``chosen`` int64 (n, k). Tokens without any
    score count as captured.
    """
    scores = scores.double()
    all_scores, own = scores.sum(1), scores.gather(1, chosen).sum(1)
    return torch.where(all_scores > 0, own / all_scores, 1.0).mean().item()


def _epochs(
    router: MlpRouter, inputs: torch.Tensor, scores: torch.Tensor, seed: int
) -> Iterator[None]:
    """Train ``router`` in place, epoch after epoch."""
    optimizer = torch.optim.Adam([w.requires_grad_() for w in router.buffers()], lr=RATE)
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


def _choose_judges(image: np.ndarray, seed: int) -> np.ndarray:
    """Which tokens judge, bool; all of an image or none, unless there is a single image."""
    images = np.random.default_rng(seed).permutation(np.unique(image))
    judges = np.isin(image, images[: max(1, round(HELD_OUT * len(images)))])
    if len(images) == 1:
        judges = np.arange(len(image)) % round(1 / HELD_OUT) == 0
    if judges.all():
        raise MoeeError(
            "two calibration tokens or more to train a router", f"{len(image)}", "use more images"
        )
    return judges
