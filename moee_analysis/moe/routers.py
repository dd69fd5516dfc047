"""Routers: which expert a token goes to.

Each maps the whole input of an MLP, (..., dim), to the expert ids (n, k) of its n tokens in
row-major order. Those that compare experts have ``scores``, (n, experts); the highest decides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import is_traced
from moee_analysis.models.macs import tokens_of


def best_experts(scores: torch.Tensor) -> torch.Tensor:
    """Return the first expert of the highest score of every token, int64 (n, 1).

    ``scores`` are (n, experts). On a CPU, NumPy's search of rows is several times as fast.
    """
    plain = type(scores) is torch.Tensor and scores.device.type == "cpu"
    if plain and scores.dtype == torch.float32 and not is_traced():
        return torch.from_numpy(scores.detach().numpy().argmax(axis=1, keepdims=True))
    return scores.argmax(dim=1, keepdim=True)


def _exact(x: torch.Tensor) -> torch.Tensor:
    """``x``, in single precision if it has half: rounded scores would make many experts tie."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CosineRouter(nn.Module):
    """Send a token to the expert whose mean input is nearest by cosine, top-1 (MoEE, phase 3).

    ``centres`` (experts, dim) are the raw mean inputs; they are normalised when used.
    """

    def __init__(self, centres: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("centres", centres)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of the tokens of ``x`` (..., dim)."""
        return best_experts(self.scores(x))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of every token with every normalised centre."""
        return _exact(tokens_of(x)) @ nn.functional.normalize(_exact(self.centres), dim=1).T

    @property
    def n_experts(self) -> int:
        """Number of experts to choose from."""
        return len(self.centres)

    @property
    def macs(self) -> int:
        """MACs per token: one product with every centre."""
        return self.centres.numel()


class NearestRouter(nn.Module):
    """Send a token to the expert of the largest directions_e . P x + offsets_e, top-1.

    This linear rule finds the nearest of some centres in any metric: :func:`nearest_in_metric`.
    ``directions`` are (experts, rank), ``offsets`` (experts,), and ``projection`` P is
    (rank, dim); None: the identity.
    """

    def __init__(
        self,
        directions: torch.Tensor,
        offsets: torch.Tensor,
        projection: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("directions", directions)
        self.register_buffer("offsets", offsets)
        self.register_buffer("projection", projection)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of the tokens of ``x`` (..., dim)."""
        return best_experts(self.scores(x))

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return directions_e . P x + offsets_e of every token and expert."""
        if self.projection is not None:  # before tokens without the leading ones are copied
            x = _exact(x) @ _exact(self.projection).T
        rule = _exact(self.directions), _exact(self.offsets)
        return nn.functional.linear(_exact(tokens_of(x)), *rule)

    @property
    def n_experts(self) -> int:
        """Number of experts to choose from."""
        return len(self.directions)

    @property
    def macs(self) -> int:
        """MACs per token: the projection, and one product with every direction."""
        projection = 0 if self.projection is None else self.projection.numel()
        return projection + self.directions.numel()


def nearest_in_metric(centres: torch.Tensor, root: torch.Tensor) -> NearestRouter:
    """Router to the expert of the smallest |root x - centre_e|, in the form of fewer MACs.

    With many centres and a low rank, tokens are projected first: rank (dim + experts) MACs
    instead of experts x dim.

    Parameters
    ----------
    centres
        Centres in the space of ``root @ x``, (experts, rank).
    root
        Linear map of the tokens, (rank, dim); root^T root is the metric.
    """
    # |Ax - c|^2 = |Ax|^2 - 2 (A^T c).x + |c|^2, and all experts have |Ax|^2 in common
    offsets = -centres.square().sum(dim=1) / 2
    if root.numel() + centres.numel() < len(centres) * root.shape[1]:
        return NearestRouter(centres, offsets, root)
    return NearestRouter(centres @ root, offsets)


class RandomRouter(nn.Module):
    """Send every token to random experts: the control that a router must beat.

    A token's experts are a pseudo-random function of its content and the seed, so that any pass
    over the same images repeats it. ``shares`` (experts,) are the probabilities; of several experts
    of a token (``k``) no two are the same.
    """

    def __init__(self, shares: torch.Tensor, *, dim: int, k: int = 1, seed: int = 0) -> None:
        super().__init__()
        generator, draws = torch.Generator().manual_seed(seed), 1 if k == 1 else len(shares)
        directions = torch.randn(dim, draws, generator=generator).double()
        probabilities = shares.double() / shares.sum()
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("edges", probabilities.cumsum(dim=0)[:-1], persistent=False)
        self.register_buffer("chances", probabilities.clamp_min(1e-300), persistent=False)
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim)."""
        spread = 1000 * (tokens_of(x).double() @ self.directions)
        drawn = spread - spread.floor()
        if self.k == 1:
            return torch.searchsorted(self.edges, drawn[:, 0])[:, None]
        # the k first of exponential waiting times (Efraimidis and Spirakis 2006)
        return (-(1 - drawn).log() / self.chances).topk(self.k, dim=1, largest=False).indices

    @property
    def n_experts(self) -> int:
        """Number of experts to choose from."""
        return len(self.chances)

    @property
    def macs(self) -> int:
        """MACs per token: none, a draw needs no product."""
        return 0


class ConstantRouter(nn.Module):
    """Send every token to the same expert or experts: a converted layer without routing."""

    def __init__(self, expert: int | Sequence[int] = 0) -> None:
        super().__init__()
        self.register_buffer("expert", torch.tensor(expert))
        self.n_experts = int(self.expert.max()) + 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim)."""
        return self.expert.reshape(1, -1).expand(tokens_of(x).shape[0], -1)

    @property
    def macs(self) -> int:
        """MACs per token: none."""
        return 0


class TokenKindRouter(nn.Module):
    """Give every leading token (CLS, distillation, registers) its own expert, and route the rest.

    The experts of the leading tokens come first in the numbering; those of the patches follow.

    Parameters
    ----------
    prefix
        Expert of each leading token, such as (0,) or (0, 1, 1).
    inner
        Router of the patches, with one expert per token; it counts its own experts from 0.
    tokens
        Tokens of one image, over which the cost of ``inner`` is averaged.
    """

    def __init__(self, prefix: Sequence[int], inner: nn.Module, *, tokens: int) -> None:
        super().__init__()
        ids = [int(expert) for expert in prefix]
        self.prefix_experts = 1 + max(ids, default=-1)
        self.inner, self.tokens = inner, tokens
        self.register_buffer("prefix", torch.tensor(ids, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of the tokens of ``x`` [B, tokens, dim].

        Raises
        ------
        MoeeError
            Another number of dimensions, fewer tokens than leading ones, or an inner router
            with several experts per token.
        """
        leading = len(self.prefix)
        if x.ndim != 3 or x.shape[1] < leading:
            raise MoeeError(
                f"tokens [images, {leading} or more, dim]", str(list(x.shape)),
                "use this router where the leading tokens of an image are known",
            )  # fmt: skip
        chosen = self.inner(x[:, leading:]) + self.prefix_experts
        if chosen.shape[1] != 1:
            raise MoeeError(
                "an inner router with one expert per token", f"{chosen.shape[1]} experts",
                "route to several experts without kinds of tokens",
            )  # fmt: skip
        patches = chosen.reshape(x.shape[0], x.shape[1] - leading)
        return torch.cat([self.prefix.expand(x.shape[0], -1), patches], dim=1).reshape(-1, 1)

    @property
    def n_experts(self) -> int:
        """Number of experts, of leading tokens and of patches."""
        return self.prefix_experts + self.inner.n_experts

    @property
    def macs(self) -> float:
        """MACs per token, on average over an image: leading tokens need no product."""
        return self.inner.macs * (self.tokens - len(self.prefix)) / self.tokens
