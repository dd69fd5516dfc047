"""MoEfication without training, on vision transformers: an MLP's neurons dealt into equal experts.

After "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (Zhang et al., 2022):
balanced k-means of the rows of W1, and top-k experts per token. The original wants ReLU; this is
the plain port to GELU, "ViT-MoEfication". All neurons stay, so no parameters are saved.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import nn

from moee_analysis.counting import count, tokens_of
from moee_analysis.errors import MoeeError
from moee_analysis.layers import MoeMlp, replace_module
from moee_analysis.models import find_mlps
from moee_analysis.balanced_kmeans import balanced_kmeans, means

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moee_analysis.models import MlpSite

EXPERTS = 96
SMALLEST = 8  # neurons of an expert, where the number of experts is not given
RouterName = Literal["centre", "oracle", "random"]


class CentreRouter(nn.Module):
    """The k experts whose centre is nearest to the token: rank by -||x / ||x|| - centre_e||.

    ``centres`` (experts, dim) are the means of the experts' L2-normalised rows of W1.
    """

    def __init__(self, centres: torch.Tensor, *, k: int) -> None:
        super().__init__()
        self.register_buffer("centres", centres)
        self.k = k

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.centres)

    @property
    def macs(self) -> int:
        """MACs per token: one product with every centre."""
        return self.centres.numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim)."""
        directions = nn.functional.normalize(tokens_of(x), dim=1)
        # ||x - c||^2 = 1 - 2 x.c + ||c||^2
        nearness = 2 * directions @ self.centres.T - self.centres.square().sum(1)
        return nearness.topk(self.k, dim=1).indices


class OracleRouter(nn.Module):
    """The k experts whose neurons really fire most: score_e = sum over e of max(a, 0).

    An upper bound for any router: it computes all hidden neurons to decide which to compute.

    Parameters
    ----------
    fc1, act
        First half of the layer's MLP, (tokens, dim) -> (tokens, hidden).
    expert_of
        Expert of every hidden neuron, int64 (hidden,).
    """

    def __init__(self, fc1: nn.Linear, act: nn.Module, expert_of: torch.Tensor, *, k: int) -> None:
        super().__init__()
        self.fc1, self.act, self.k = fc1, act, k
        self.n_experts = int(expert_of.max()) + 1
        self.register_buffer("expert_of", expert_of)

    @property
    def macs(self) -> int:
        """MACs per token: the whole first half of the MLP."""
        return self.fc1.weight.numel()

    def scores(self, tokens: torch.Tensor) -> torch.Tensor:
        """Positive activation of every expert, (n, experts), for ``tokens`` (n, dim)."""
        fired = self.act(self.fc1(tokens)).clamp(min=0)
        return fired.new_zeros(len(tokens), self.n_experts).index_add_(1, self.expert_of, fired)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim)."""
        return self.scores(tokens_of(x)).topk(self.k, dim=1).indices


class RandomTopRouter(nn.Module):
    """k different random experts for every token: the control that a router must beat.

    The draw is a pseudo-random function of the token's content and the seed.
    """

    def __init__(self, n_experts: int, *, dim: int, k: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(dim, n_experts, generator=generator, dtype=torch.float64)
        self.register_buffer("directions", directions, persistent=False)
        self.n_experts, self.k = n_experts, k

    @property
    def macs(self) -> int:
        """MACs per token: none, a draw needs no product."""
        return 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return expert ids, int64 (n, k), of the tokens of ``x`` (..., dim)."""
        spread = 1000 * (tokens_of(x).double() @ self.directions)
        return (spread - spread.floor()).topk(self.k, dim=1).indices


def moefy(
    model: nn.Module,
    *,
    active: float,
    n_experts: int | None = None,
    expert_size: int | None = None,
    router: RouterName = "centre",
    seed: int = 0,
    sites: Sequence[MlpSite] | None = None,
) -> nn.Module:
    """Turn the MLPs of a copy of ``model`` into experts by their weights alone.

    Parameters
    ----------
    active
        Share of the experts that each token uses, in (0, 1], on average over the layers; see
        :func:`matching_active`.
    n_experts, expert_size
        Experts of a layer, or neurons of an expert; None: 96 experts of at least 8 neurons.
        Sizes differ by one neuron at most.
    router
        ``centre`` (nearest parameter centre), ``oracle`` (an upper bound) or ``random``.
    seed
        Of the k-means and of the random router.
    sites
        MLPs to convert; None: all of ``find_mlps``.

    Raises
    ------
    MoeeError
        A share outside (0, 1], more experts than neurons, or both sizes given.
    """
    if not 0 < active <= 1:
        raise MoeeError("active as a share in (0, 1]", str(active), "0.4 means 40 %")
    copied, rest = copy.deepcopy(model), 0.0
    for site in find_mlps(model) if sites is None else sites:
        experts = _experts(site.hidden, n_experts, expert_size)
        wanted = active * experts + rest  # what rounding took from one layer, the next one gets
        k = min(max(1, round(wanted)), experts)
        rest = wanted - k
        layer = _moefied(site.module(copied), experts, router, k=k, seed=seed)
        replace_module(copied, site.name, layer)
    return copied.eval()


def matching_active(
    model: nn.Module,
    macs_reduction: float,
    *,
    n_experts: int | None = None,
    expert_size: int | None = None,
    sites: Sequence[MlpSite] | None = None,
) -> float:
    """Share of experts for :func:`moefy` to save ``macs_reduction`` of the model's MACs.

    The centre router's MACs are paid from the same budget. Whole experts are used, so the
    budget is met to within one expert of one layer where all layers are alike.

    Raises
    ------
    MoeeError
        The MLPs cannot save so much.
    """
    sites = find_mlps(model) if sites is None else sites
    counted = count(model)
    routers = {
        site.name: site.dim * _experts(site.hidden, n_experts, expert_size) for site in sites
    }
    fixed = counted.replacing(routers)
    mlps = sum(counted.by_module[site.name] for site in sites)
    active = ((1 - macs_reduction) * counted.total - fixed) / mlps
    if not 0 < active <= 1:
        raise MoeeError(
            f"a MACs reduction between {1 - (fixed + mlps) / counted.total:.3f} and "
            f"{1 - fixed / counted.total:.3f}",
            str(macs_reduction),
            "choose another budget",
        )
    return active


def deal_neurons(
    weight: torch.Tensor, experts: int, *, seed: int = 0
) -> tuple[np.ndarray, torch.Tensor]:
    """Deal the rows of W1, (hidden, dim), into experts of equal size.

    Returns
    -------
    expert_of, centres
        Expert of every neuron, int64 (hidden,), and the mean of each expert's L2-normalised
        rows, float32 (experts, dim).
    """
    rows = nn.functional.normalize(weight.detach().double().cpu(), dim=1).numpy()
    expert_of = balanced_kmeans(rows, experts, seed=seed)
    return expert_of, torch.from_numpy(means(rows, expert_of, experts)).float()


def _experts(hidden: int, n_experts: int | None, expert_size: int | None) -> int:
    """Number of experts of a layer of ``hidden`` neurons."""
    if n_experts is not None and expert_size is not None:
        raise MoeeError("n_experts or expert_size", "both", "give one of them")
    if expert_size is not None:
        experts = round(hidden / expert_size)
    else:
        experts = n_experts or min(EXPERTS, max(1, hidden // SMALLEST))
    if not 1 <= experts <= hidden:
        raise MoeeError(
            f"1 to {hidden} experts for {hidden} hidden neurons", str(experts), "choose fewer"
        )
    return experts


def _moefied(mlp: nn.Module, experts: int, router: RouterName, *, k: int, seed: int) -> MoeMlp:
    expert_of, centres = deal_neurons(mlp.fc1.weight, experts, seed=seed)
    neurons = [np.flatnonzero(expert_of == e) for e in range(experts)]
    even = np.full(experts, k / experts)
    layer = MoeMlp(mlp, nn.Identity(), neurons, even)
    layer.router = _router(router, layer, expert_of, centres, k=k, seed=seed)
    return layer.to(mlp.fc1.weight.device)


def _router(
    name: RouterName,
    layer: MoeMlp,
    expert_of: np.ndarray,
    centres: torch.Tensor,
    *,
    k: int,
    seed: int,
) -> nn.Module:
    experts, dim = centres.shape
    if name == "centre":
        return CentreRouter(centres.to(layer.fc1.weight.dtype), k=k)
    if name == "oracle":
        return OracleRouter(layer.fc1, layer.act, torch.from_numpy(expert_of), k=k)
    if name == "random":
        return RandomTopRouter(experts, dim=dim, k=k, seed=seed)
    raise MoeeError("a router among centre, oracle, random", f"'{name}'", "name one")
