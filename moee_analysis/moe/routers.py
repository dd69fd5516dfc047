"""Routers: which expert a token goes to. ``ROUTERS`` lists them."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import is_traced
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.kernels import in_blocks
from moee_analysis.moe.layer import MoeMlp


class Router(nn.Module):
    """From the whole input of an MLP, (..., dim), to expert ids of its n tokens, int64 (n, k).

    Tokens are in row-major order. A router chooses among ``n_experts`` and costs ``macs`` per
    token. One that compares experts has ``scores``, (n, experts); the highest decides.
    """

    def __init__(self, n_experts: int, macs: float) -> None:
        super().__init__()
        self.n_experts, self.macs = n_experts, macs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k)."""
        scores = self.scores(x)
        plain = type(scores) is torch.Tensor and scores.device.type == "cpu"
        if plain and scores.dtype == torch.float32 and not is_traced():
            # NumPy's search of rows is several times as fast
            return torch.from_numpy(scores.detach().numpy().argmax(axis=1, keepdims=True))
        return scores.argmax(dim=1, keepdim=True)

    def settings(self) -> dict[str, Any]:
        """What the tensors of the router do not tell of it, as JSON."""
        return {}

    @classmethod
    def rebuild(cls, _settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Router of these settings, with ``tensors`` of the saved shapes."""
        return cls(**{name: tensor.clone() for name, tensor in tensors.items()})


def _exact(x: torch.Tensor) -> torch.Tensor:
    # rounded to half precision, the scores of many experts would tie
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CosineRouter(Router):
    """Send a token to the expert whose mean input is nearest by cosine, top-1 (MoEE, phase 3).

    ``centres`` (experts, dim) are the raw means; they are normalised when used.
    """

    def __init__(self, centres: torch.Tensor) -> None:
        super().__init__(len(centres), centres.numel())
        self.register_buffer("centres", centres)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product of every token with every normalised centre."""
        return _exact(tokens_of(x)) @ nn.functional.normalize(_exact(self.centres), dim=1).T


class NearestRouter(Router):
    """Send a token to the expert of the largest directions_e . P x + offsets_e, top-1.

    ``directions`` are (experts, rank), ``offsets`` (experts,), ``projection`` P (rank, dim) or the
    identity. The rule finds the nearest centre in any metric: :func:`nearest_in_metric`.
    """

    def __init__(
        self,
        directions: torch.Tensor,
        offsets: torch.Tensor,
        projection: torch.Tensor | None = None,
    ) -> None:
        projecting = 0 if projection is None else projection.numel()
        super().__init__(len(directions), projecting + directions.numel())
        self.register_buffer("directions", directions)
        self.register_buffer("offsets", offsets)
        self.register_buffer("projection", projection)

    def scores(self, x: torch.Tensor) -> torch.Tensor:
        """Return directions_e . P x + offsets_e of every token and expert."""
        if self.projection is not None:  # before tokens without the leading ones are copied
            x = _exact(x) @ _exact(self.projection).T
        rule = _exact(self.directions), _exact(self.offsets)
        return nn.functional.linear(_exact(tokens_of(x)), *rule)


def nearest_in_metric(centres: torch.Tensor, root: torch.Tensor) -> NearestRouter:
    """Router to the expert of the smallest |root x - centre_e|, in the form of fewer MACs.

    ``centres`` are (experts, rank), ``root`` (rank, dim); root^T root is the metric.
    """
    # |Ax - c|^2 = |Ax|^2 - 2 (A^T c).x + |c|^2, and all experts have |Ax|^2 in common
    offsets = -centres.square().sum(dim=1) / 2
    # tokens are projected first: rank (dim + experts) MACs in the place of experts x dim
    if root.numel() + centres.numel() < len(centres) * root.shape[1]:
        return NearestRouter(centres, offsets, root)
    return NearestRouter(centres @ root, offsets)


class RandomRouter(Router):
    """Send every token to random experts: the control that a router must beat.

    Its ``k`` experts, no two the same, of the probabilities ``shares`` (experts,), are a
    pseudo-random function of its content and the seed: any pass over the images repeats it.
    """

    def __init__(self, shares: torch.Tensor, *, dim: int, k: int = 1, seed: int = 0) -> None:
        super().__init__(len(shares), 0)
        generator, draws = torch.Generator().manual_seed(seed), 1 if k == 1 else len(shares)
        directions = torch.randn(dim, draws, generator=generator).double()
        probabilities = shares.double() / shares.sum()
        self.register_buffer("directions", directions, persistent=False)
        self.register_buffer("edges", probabilities.cumsum(dim=0)[:-1], persistent=False)
        self.register_buffer("chances", probabilities.clamp_min(1e-300), persistent=False)
        self.k = k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k)."""
        spread = 1000 * (tokens_of(x).double() @ self.directions)
        uniform = spread - spread.floor()
        if self.k == 1:
            return torch.searchsorted(self.edges, uniform[:, 0])[:, None]
        # the k first of exponential waiting times (Efraimidis and Spirakis 2006)
        return (-(1 - uniform).log() / self.chances).topk(self.k, dim=1, largest=False).indices


class ConstantRouter(Router):
    """Send every token to the same expert or experts: a converted layer without routing."""

    def __init__(self, expert: int | Sequence[int] | torch.Tensor = 0) -> None:
        ids = torch.as_tensor(expert)
        super().__init__(int(ids.max()) + 1, 0)
        self.register_buffer("expert", ids)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k)."""
        return self.expert.reshape(1, -1).expand(tokens_of(x).shape[0], -1)


class TokenKindRouter(Router):
    """Give every leading token (CLS, distillation, registers) its own expert, and route the rest.

    ``prefix`` are the experts of the leading tokens, such as (0, 1, 1); those of ``inner``, the
    router of the patches, follow. Its cost is averaged over the ``tokens`` of an image.
    """

    def __init__(self, prefix: Sequence[int], inner: nn.Module, *, tokens: int) -> None:
        ids = [int(expert) for expert in prefix]
        leading = 1 + max(ids, default=-1)
        super().__init__(leading + inner.n_experts, inner.macs * (tokens - len(ids)) / tokens)
        self.prefix_experts, self.inner, self.tokens = leading, inner, tokens
        self.register_buffer("prefix", torch.tensor(ids, dtype=torch.int64), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1), of ``x`` [B, tokens, dim]; refuses another shape."""
        leading = len(self.prefix)
        if x.ndim != 3 or x.shape[1] < leading:
            raise MoeeError(
                f"tokens [images, {leading} or more, dim]", str(list(x.shape)),
                "use this router where the leading tokens of an image are known",
            )  # fmt: skip
        chosen = self.inner(x[:, leading:]) + self.prefix_experts
        patches = chosen.reshape(x.shape[0], x.shape[1] - leading)
        return torch.cat([self.prefix.expand(x.shape[0], -1), patches], dim=1).reshape(-1, 1)

    def settings(self) -> dict[str, Any]:
        """Experts of the leading tokens, and the router of the others."""
        own = {"prefix": self.prefix.tolist(), "tokens": self.tokens}
        return own | {"inner": describe_router(self.inner)}

    @classmethod
    def rebuild(cls, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Self:
        """Router of these settings, and the one that was saved inside it."""
        inner = {name.removeprefix("inner."): tensor for name, tensor in tensors.items()}
        router = rebuild_router(settings["inner"], inner)
        return cls(settings["prefix"], router, tokens=settings["tokens"])


ROUTERS: dict[str, type[Router]] = {
    "cosine": CosineRouter,
    "constant": ConstantRouter,
    "nearest": NearestRouter,
    "token_kinds": TokenKindRouter,
}
"""Routers that a run can be saved with, by their names in its JSON."""


def describe_router(router: nn.Module) -> dict[str, Any]:
    """Name and settings of a router, as JSON; refuses one that is not in :data:`ROUTERS`."""
    kind = next((name for name, known in ROUTERS.items() if type(router) is known), None)
    if kind is None:
        raise MoeeError(
            f"a router that can be saved ({', '.join(ROUTERS)})", type(router).__name__,
            "save the run itself, not a control made from it",
        )  # fmt: skip
    return {"kind": kind} | router.settings()


def rebuild_router(described: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Router as :func:`describe_router` describes it, with ``tensors`` of the saved shapes."""
    return ROUTERS[described["kind"]].rebuild(described, tensors)


class OracleRouter(Router):
    """Send a token to the expert whose output for it is nearest to that of the dense MLP.

    A bound for routers, which computes all that they should save. Experts of leading tokens are
    never chosen, and not counted.
    """

    def __init__(self, dense: nn.Module, layer: MoeMlp) -> None:
        leading = prefix_experts(layer)
        neurons = dense.fc1.out_features + sum(layer.expert_sizes[leading:])
        macs = (layer.fc1.in_features + layer.fc2.out_features) * neurons
        super().__init__(layer.n_experts - leading, macs)
        self._compared = dense, copy.deepcopy(layer)  # in a tuple: not among the model's modules

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, 1)."""
        return self.errors(x).argmin(dim=1, keepdim=True)

    def errors(self, x: torch.Tensor) -> torch.Tensor:
        """Squared error of the output of every expert, (n, experts), for the tokens of ``x``."""
        blocks = zip(in_blocks(tokens_of(x)), in_blocks(tokens_of(self.wanted(x))), strict=True)
        return torch.cat([self._errors(*block) for block in blocks])

    def wanted(self, x: torch.Tensor) -> torch.Tensor:
        """Output of the dense MLP for ``x``, without its hooks: one of them may be what asks."""
        return self._compared[0].forward(x)

    def _errors(self, tokens: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        layer = self._compared[1]
        hidden, found = layer.act(layer.fc1(tokens)), []
        for expert in range(layer.n_experts - self.n_experts, layer.n_experts):
            own = layer.expert_neurons(expert)
            shift = 0 if layer.shift is None else layer.shift[expert]
            w2 = layer.fc2.weight.index_select(1, own)
            output = torch.addmm(layer.fc2.bias + shift, hidden.index_select(1, own), w2.T)
            found.append((output - wanted).square().sum(dim=1))
        return torch.stack(found, dim=1)


def prefix_experts(layer: MoeMlp) -> int:
    """How many experts of ``layer`` leading tokens have by their position."""
    return layer.router.prefix_experts if isinstance(layer.router, TokenKindRouter) else 0


def beside_leading(router: nn.Module, layer: MoeMlp) -> nn.Module:
    """``router`` for the other tokens of ``layer``; leading ones keep their experts."""
    if not isinstance(layer.router, TokenKindRouter):
        return router
    return TokenKindRouter(layer.router.prefix.tolist(), router, tokens=layer.router.tokens)
