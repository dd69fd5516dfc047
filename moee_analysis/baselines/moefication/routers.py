"""The routers of MoEfication: the k experts of the highest score, known, guessed or learned."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import normalize, pad

from moee_analysis.baselines.moefication.config import MoeficationConfig, Score
from moee_analysis.models.loading import MlpSite
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels.dispatch import in_blocks
from moee_analysis.moe.layer import MoeMlp


@dataclass(frozen=True)
class Origin:
    """How a layer was made: the way its neurons were dealt, and the score of its experts.

    ``mean`` (hidden,) is that of the hidden activations of the calibration tokens.
    """

    split: str
    score: Score
    mean: torch.Tensor


def router_macs(config: MoeficationConfig, site: MlpSite, experts: int) -> int:
    """MACs per token of the router that ``config`` asks for."""
    centres = site.dim * experts
    outputs = site.hidden * site.dim if config.score == "out" else 0
    return {
        "centre": centres,
        "mlp": centres + experts**2,
        "oracle": site.dim * site.hidden + outputs,
    }.get(config.router, 0)


class _TopScores(nn.Module):
    """Maps the whole input of an MLP, (..., dim), to the ids of the k experts of highest score."""

    k: int

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Score of every expert, (n, experts), for the tokens of ``x`` (..., dim)."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim) in row-major order."""
        return self.scores(x).topk(self.k, dim=1).indices


class CentreRouter(_TopScores):
    """The k experts whose centre is nearest to the token: rank by -||x / ||x|| - centre_e||.

    ``centres`` (experts, dim) are the means of the experts' L2-normalised rows of W1.
    """

    def __init__(self, centres: torch.Tensor, *, k: int) -> None:
        super().__init__()
        self.register_buffer("centres", centres)
        self.k, self.n_experts = k, len(centres)

    @property
    def macs(self) -> int:
        """MACs per token: one product with every centre."""
        return self.centres.numel()

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Nearness to every centre, (n, experts), for the tokens of ``x`` (..., dim)."""
        # ||x - c||^2 = 1 - 2 x.c + ||c||^2
        products = normalize(tokens_of(x), dim=1) @ self.centres.T
        return 2 * products - self.centres.square().sum(1)


class MlpRouter(_TopScores):
    """The k experts of the highest W tanh(V x / ||x||), a small MLP without biases.

    It begins near the :class:`CentreRouter`, with ``inward`` V (experts, dim) the centres and
    ``outward`` W (experts, experts) the identity, and learns from there (``train_router``).
    """

    def __init__(self, inward: torch.Tensor, outward: torch.Tensor, *, k: int) -> None:
        super().__init__()
        self.register_buffer("inward", inward)
        self.register_buffer("outward", outward)
        self.k, self.n_experts = k, len(outward)

    @property
    def macs(self) -> int:
        """MACs per token: two products."""
        return self.inward.numel() + self.outward.numel()

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Logit of every expert, (n, experts), for the tokens of ``x`` (..., dim)."""
        return (normalize(tokens_of(x), dim=1) @ self.inward.T).tanh() @ self.outward.T


class GroundTruthRouter(_TopScores):
    """The k experts of the highest true score: an upper bound for all routers by that score.

    It computes all hidden neurons of ``layer``, whose weights it shares, and for the score ``out``
    all outputs, to decide which to compute. The ``origin`` says the score.
    """

    def __init__(self, layer: MoeMlp, origin: Origin, *, k: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = layer.fc1, layer.act, layer.fc2
        self.score, self.k = origin.score, k
        mean = origin.mean.to(layer.fc1.weight) if origin.score == "var" else None
        own = layer.neurons.split(layer.expert_sizes)
        # neurons by expert (experts, width); `hidden` stands for none
        members = nn.utils.rnn.pad_sequence(
            list(own), batch_first=True, padding_value=layer.fc1.out_features
        )
        self.n_experts = len(members)
        self.register_buffer("mean", mean)
        self.register_buffer("members", members, persistent=False)

    @property
    def macs(self) -> int:
        """MACs per token: the first half of the MLP, or the whole MLP."""
        outputs = self.fc2.weight.numel() if self.score == "out" else 0
        return self.fc1.weight.numel() + outputs

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Score of every expert, (n, experts), for the tokens of ``x`` (..., dim)."""
        return torch.cat([self._scores(block) for block in in_blocks(tokens_of(x))])

    def _scores(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.act(self.fc1(tokens))
        if self.score == "out":
            return self._output_lengths(hidden)
        if self.score == "pos":
            worth = hidden.clamp(min=0)
        elif self.score == "abs":
            worth = hidden.abs()
        else:
            worth = (hidden - self.mean).square() * self.fc2.weight.square().sum(0)
        return self._by_expert(worth).sum(2)

    def _output_lengths(self, hidden: torch.Tensor) -> torch.Tensor:
        weights = self._by_expert(self.fc2.weight).permute(1, 2, 0)  # (experts, width, dim)
        outputs = self._by_expert(hidden).transpose(0, 1) @ weights
        return outputs.norm(dim=2).T

    def _by_expert(self, values: torch.Tensor) -> torch.Tensor:
        """Values (n, hidden) by expert, (n, experts, width); zeros where an expert is smaller."""
        return pad(values, (0, 1))[:, self.members]
