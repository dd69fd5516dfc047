"""The routers of MoEfication: the k experts of the highest score, known, guessed or learned."""

import copy
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, normalize, pad

from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels import in_blocks
from moee_analysis.moe.layer import MoeMlp
from moee_analysis.moe.routers import Router


class _TopScores(Router):
    """A router to the k experts of the highest ``scores``."""

    def __init__(self, n_experts: int, macs: float, *, k: int) -> None:
        super().__init__(n_experts, macs)
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k)."""
        return self.scores(x).topk(self.k, dim=1).indices


class CentreRouter(_TopScores):
    """The k experts whose centre is nearest to the token: rank by -||x / ||x|| - centre_e||.

    ``centres`` (experts, dim) are the means of the experts' L2-normalised rows of W1.
    """

    def __init__(self, centres: torch.Tensor, *, k: int) -> None:
        super().__init__(len(centres), centres.numel(), k=k)
        self.register_buffer("centres", centres)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Nearness to every centre, (n, experts), for the tokens of ``x`` (..., dim)."""
        # ||x - c||^2 = 1 - 2 x.c + ||c||^2
        products = normalize(tokens_of(x), dim=1) @ self.centres.T
        return 2 * products - self.centres.square().sum(1)


class MlpRouter(_TopScores):
    """The k experts of the highest W tanh(V x / ||x||), a small MLP without biases.

    ``inward`` V is (experts, dim), ``outward`` W (experts, experts).
    """

    def __init__(self, inward: torch.Tensor, outward: torch.Tensor, *, k: int) -> None:
        super().__init__(len(outward), inward.numel() + outward.numel(), k=k)
        self.register_buffer("inward", inward)
        self.register_buffer("outward", outward)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logit of every expert, (n, experts), for the tokens of ``x`` (..., dim)."""
        return (normalize(tokens_of(x), dim=1) @ self.inward.T).tanh() @ self.outward.T


class GroundTruthRouter(_TopScores):
    """The k experts of the highest true score: an upper bound for all routers by that score.

    It computes all hidden neurons of ``layer``, whose weights it shares.
    """

    def __init__(self, layer: MoeMlp, *, k: int) -> None:
        super().__init__(layer.n_experts, layer.fc1.weight.numel(), k=k)
        self.fc1, self.act = layer.fc1, layer.act
        own = layer.neurons.split(layer.expert_sizes)
        none = layer.fc1.out_features  # neurons by expert (experts, width)
        members = nn.utils.rnn.pad_sequence(list(own), batch_first=True, padding_value=none)
        self.register_buffer("members", members, persistent=False)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of every expert's positive activations, (n, experts), for ``x`` (..., dim)."""
        blocks = (self.act(self.fc1(tokens)).clamp(min=0) for tokens in in_blocks(tokens_of(x)))
        # where an expert is smaller than others, zeros are added
        return torch.cat([pad(worth, (0, 1))[:, self.members].sum(2) for worth in blocks])


EPOCHS = 30
PATIENCE = 5  # epochs without a better one, after which there is no further one
BATCH = 512
RATE = 1e-2
HELD_OUT = 0.1  # of the images


def train_router(
    centres: torch.Tensor,
    inputs: torch.Tensor,
    scores: torch.Tensor,
    *,
    image: np.ndarray,
    k: int,
    seed: int = 0,
) -> tuple[MlpRouter, list[float]]:
    """Train a router to find the experts of the highest scores, beginning near `CentreRouter`.

    The target of an expert is its score by the largest of the batch, the loss the binary
    cross-entropy of the router's logits, minimised by Adam. Nine tenths of the images teach, the
    others choose the epoch. Returned beside the router of that epoch is the share of the score that
    is :func:`captured` there, before the training and after each epoch.

    ``centres`` are (experts, dim), ``inputs`` tokens (n, dim) with the true ``scores`` of all
    experts (n, experts), none negative, and the ``image`` of each, (n,).

    Raises ``MoeeError``: a single token.
    """
    judges = _choose_judges(image, seed)
    teach, judge = (torch.from_numpy(np.flatnonzero(rows)) for rows in (~judges, judges))
    router = MlpRouter(centres.clone(), torch.eye(len(centres)).to(centres), k=k)
    best, found = copy.deepcopy(router), [captured(scores[judge], router(inputs[judge]))]
    for _ in _train_epochs(router, inputs[teach], scores[teach], seed):
        with torch.no_grad():
            found.append(captured(scores[judge], router(inputs[judge])))
        if found[-1] > max(found[:-1]):
            best = copy.deepcopy(router)
        if len(found) - 1 - int(np.argmax(found)) == PATIENCE:
            break
    for weights in best.buffers():
        weights.requires_grad_(requires_grad=False)
    return best, found


def captured(scores: torch.Tensor, chosen: torch.Tensor) -> float:
    """Mean over tokens of the share of all ``scores`` (n, experts) of the ``chosen`` int64 (n, k).

    No score is negative; tokens without any count as captured.
    """
    scores = scores.double()
    all_scores, own = scores.sum(1), scores.gather(1, chosen).sum(1)
    return torch.where(all_scores > 0, own / all_scores, 1.0).mean().item()


def _train_epochs(
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
