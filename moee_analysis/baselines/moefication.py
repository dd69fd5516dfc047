"""MoEfication: the hidden neurons of a trained MLP dealt into equal experts, k of them per token.

"MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (Zhang et al., 2022), which
wants ReLU networks, and its port to vision transformers with GELU, "ViT-MoEfication", with the mean
of what is left out. All neurons stay: no parameters are saved. The score of an expert is the sum of
its positive activations, as published.
"""

import copy
import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from moee_analysis.baselines.common import equal_parts
from moee_analysis.baselines.common import moefication_routers as routers
from moee_analysis.baselines.common.exchange import Store, sites_at
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import MACS_REDUCTION
from moee_analysis.extraction.record.recording import Recording, load_sample
from moee_analysis.extraction.record.tokens import LayerSample, token_plan
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, replace_module
from moee_analysis.utils.checks import check_settings
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.folders import scratch_folder

EXPERTS = 96
SMALLEST = 8  # neurons of an expert, where the number of experts is not given
BLOCK = 8192  # tokens whose hidden activations are in memory at once


@dataclass(frozen=True)
class MoeficationConfig:
    """How the MLPs of a model become experts.

    The budget: ``macs_reduction`` is the share of all MACs of the dense model to save, of which the
    router pays its own; or ``active`` is the share of the experts that each token uses, on average
    over the layers, whatever the router costs (published: 0.2). Neither: 28 % of the MACs.

    - ``n_experts`` of a layer, whose sizes differ by one neuron at most; None: 96, or fewer of at
      least 8 neurons.
    - ``split``: balanced ``kmeans`` of the rows of W1; ``graph``, neurons that are active together;
      or ``random``.
    - ``router``: ``centre``, the nearest mean row of W1; an ``mlp`` that learns the score; or the
      ``oracle`` that knows it, which costs half of the MLP.
    - ``mean_compensation``: experts that a token does not use give their mean output, not nothing.
    - ``tokens``: about how many calibration tokens of a layer are looked at.
    - ``layers``: MLPs to convert, counted from 0; None: all.
    """

    macs_reduction: float | None = None
    active: float | None = None
    n_experts: int | None = None
    split: Literal["kmeans", "graph", "random"] = "kmeans"
    router: Literal["centre", "mlp", "oracle"] = "mlp"
    mean_compensation: bool = False
    tokens: int = 40_000
    seed: int = 0
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_settings(self)
        if self.macs_reduction is not None and self.active is not None:
            raise MoeeError("macs_reduction or active", "both", "give one of them")
        if self.macs_reduction is None and self.active is None:
            object.__setattr__(self, "macs_reduction", MACS_REDUCTION)

    def experts(self, site: MlpSite) -> int:
        """Number of experts of a layer.

        Raises ``MoeeError``: more experts than neurons.
        """
        experts = self.n_experts or min(EXPERTS, max(1, site.hidden // SMALLEST))
        if experts > site.hidden:
            raise MoeeError(
                f"1 to {site.hidden} experts for the {site.hidden} hidden neurons of {site.name}",
                str(experts), "choose another number",
            )  # fmt: skip
        return experts


@torch.inference_mode(mode=False)
def convert(
    dense: nn.Module, images: ImageSet, config: MoeficationConfig, *, store: Store = None
) -> nn.Module:
    """Turn the MLPs of a copy of ``dense`` into experts; each layer's ``origin`` says how.

    Labels of the calibration ``images`` are not used; the ``store`` keeps the layers' inputs.

    Raises ``MoeeError``: no MLPs to convert, more experts than neurons, a budget that cannot be
    met, a full disk.
    """
    source = copy.deepcopy(dense).eval()
    sites, sizes = sites_at(find_mlps(source), config.layers), count_experts(source, config)
    if config.split == "graph":
        tell(f"MoEfication: experts by {describe_split('graph')}")
    each = max(1, round(config.tokens / len(images)))
    plan = token_plan(source, [site.name for site in sites], each, seed=config.seed)
    with scratch_folder("store") if store is None else nullcontext(store) as root:
        folder = Recording(source, images, tuple(sites), plan, ("inputs",)).to_disk(Path(root))
        for site in sites:
            tokens = thin_sample(load_sample(folder, site), site.module(source), seed=config.seed)
            replace_module(source, site.name, _moefy(tokens, config, *sizes[site.name]))
    return source


def oracle_routed(moefied: nn.Module) -> nn.Module:
    """Copy a converted model, and route each token to the k experts of the highest true score."""
    model = copy.deepcopy(moefied)
    for layer in moe_layers(model).values():
        k = round(layer.shares.sum().item())
        layer.router = routers.GroundTruthRouter(layer, k=k).to(layer.shares.device)
    return model


def matching_active(dense: nn.Module, config: MoeficationConfig) -> float:
    """Share of the experts of every layer that is left when all else and the routers are paid.

    Raises ``MoeeError``: the MLPs cannot save so much.
    """
    if config.active is not None:
        return config.active
    counted, sites = count(dense), sites_at(find_mlps(dense), config.layers)
    fixed = counted.replacing({s.name: router_macs(config, s, config.experts(s)) for s in sites})
    mlps = sum(counted.by_module[site.name] for site in sites)
    active = ((1 - config.macs_reduction) * counted.total - fixed) / mlps
    least = sum(counted.by_module[s.name] / config.experts(s) for s in sites) / mlps
    if least <= active <= 1:
        return active
    lowest = max(0, 1 - (fixed + mlps) / counted.total)
    highest = 1 - (fixed + least * mlps) / counted.total
    if highest < lowest:
        raise MoeeError(
            "a router that leaves MACs to save",
            f"router='{config.router}', which costs more than the experts save",
            "choose another router, or give the share of active experts in place of macs_reduction",
        )
    raise MoeeError(
        f"a MACs reduction between {lowest:.3f} and {highest:.3f} with this router",
        f"{config.macs_reduction} with router='{config.router}'",
        "choose another budget or router",
    )


def count_experts(dense: nn.Module, config: MoeficationConfig) -> dict[str, tuple[int, int]]:
    """How many experts each layer has and how many of them, k, a token uses, by site name.

    All layers use the same share of their experts. What rounding leaves of one layer's MACs the
    next one gets: all together spend the budget, to within one expert of one layer.
    """
    active, counted = matching_active(dense, config), count(dense)
    found, left = {}, 0.0
    for site in sites_at(find_mlps(dense), config.layers):
        experts = config.experts(site)
        each = counted.by_module[site.name] / experts
        left += active * counted.by_module[site.name]
        k = min(max(1, math.floor(left / each + 1e-6)), experts)
        left -= k * each
        found[site.name] = experts, k
    return found


def router_macs(config: MoeficationConfig, site: MlpSite, experts: int) -> int:
    """MACs per token of the router that ``config`` asks for."""
    centres = site.dim * experts
    known = {"centre": centres, "mlp": centres + experts**2, "oracle": site.dim * site.hidden}
    return known[config.router]


@dataclass(frozen=True)
class LayerTokens:
    """Inputs of one MLP, (tokens, dim), each as common as any other, and the image of each."""

    mlp: nn.Module
    inputs: torch.Tensor
    image: np.ndarray

    @torch.no_grad()
    def hidden(self) -> Iterator[torch.Tensor]:
        """Hidden activations (n, hidden) of all tokens, in order, some at a time."""
        for inputs in self.inputs.split(BLOCK):
            yield self.mlp.act(self.mlp.fc1(inputs))

    def mean(self) -> torch.Tensor:
        """Mean of the hidden activations, float64 (hidden,)."""
        return sum(hidden.double().sum(0) for hidden in self.hidden()) / len(self.inputs)


def thin_sample(sample: LayerSample, mlp: nn.Module, *, seed: int = 0) -> LayerTokens:
    """Thin out a ``sample`` until leading tokens are as common as they are in the images."""
    weight = sample.weight[:]
    chance = np.random.default_rng(seed).random(len(weight))
    rows = np.flatnonzero(chance * weight.max() < weight)
    inputs = torch.from_numpy(sample.inputs[rows]).to(mlp.fc1.weight)
    return LayerTokens(mlp, inputs, sample.image[rows])


@dataclass(frozen=True)
class Origin:
    """How the neurons of a layer were dealt, and the ``mean`` (hidden,) of their activations."""

    split: str
    mean: torch.Tensor


def split_neurons(split: str, tokens: LayerTokens, experts: int, *, seed: int) -> np.ndarray:
    """Expert of every hidden neuron, int64 (hidden,); sizes differ by one at most."""
    if split == "kmeans":
        return equal_parts.balanced_kmeans(_unit_rows(tokens.mlp.fc1.weight), experts, seed=seed)
    if split == "graph":
        edges = equal_parts.graph_edges(equal_parts.coactivation(tokens.hidden()))
        return equal_parts.divide_graph(edges, experts, seed=seed)
    hidden = tokens.mlp.fc1.out_features
    return np.random.default_rng(seed).permutation(np.arange(hidden) % experts)


def describe_split(split: str) -> str:
    """Name of a split, with the method that divides the graph here."""
    return f"graph, {equal_parts.best_method()}" if split == "graph" else split


def _unit_rows(weight: torch.Tensor) -> np.ndarray:
    return normalize(weight.detach().double().cpu(), dim=1).numpy()


@torch.no_grad()
def _moefy(tokens: LayerTokens, config: MoeficationConfig, experts: int, k: int) -> MoeMlp:
    expert_of = split_neurons(config.split, tokens, experts, seed=config.seed)
    origin = Origin(describe_split(config.split), tokens.mean())
    layer = _make_layer(tokens.mlp, expert_of, origin, means=config.mean_compensation)
    layer.router = _make_router(layer, expert_of, tokens, config, k=k).to(layer.shares.device)
    used = layer.usage(torch.cat([layer.router(x) for x in tokens.inputs.split(BLOCK)]))
    layer.shares.copy_(used / len(tokens.inputs))
    return layer


def _make_layer(mlp: nn.Module, expert_of: np.ndarray, origin: Origin, *, means: bool) -> MoeMlp:
    """The experts of ``mlp``; all of them together are the MLP, compensated or not."""
    neurons = [np.flatnonzero(expert_of == expert) for expert in range(expert_of.max() + 1)]
    readout, shift = Readout(), None
    if means:  # an expert that a token does not use gives its mean output W2_e mu_e
        weight = mlp.fc2.weight.double()
        shift = torch.stack([weight[:, ids] @ origin.mean[ids] for ids in neurons])
        readout = Readout(shift=-shift)
    layer = MoeMlp(mlp, nn.Identity(), neurons, np.ones(len(neurons)), readout)
    if shift is not None:
        layer.fc2.bias += shift.sum(0).to(layer.fc2.bias)
    layer.origin = origin
    return layer.to(mlp.fc1.weight.device)


def _make_router(
    layer: MoeMlp, expert_of: np.ndarray, tokens: LayerTokens, config: MoeficationConfig, *, k: int
) -> routers.CentreRouter | routers.GroundTruthRouter | routers.MlpRouter:
    # mean of each expert's L2-normalised rows of W1
    means = equal_parts.cluster_means(_unit_rows(layer.fc1.weight), expert_of, layer.n_experts)
    centres = torch.from_numpy(means).to(layer.fc1.weight)
    if config.router == "centre":
        return routers.CentreRouter(centres, k=k)
    truth = routers.GroundTruthRouter(layer, k=k).to(centres.device)
    if config.router == "oracle":
        return truth
    facts = {"image": tokens.image, "k": k, "seed": config.seed}
    learned, _ = routers.train_router(centres, tokens.inputs, truth.scores(tokens.inputs), **facts)
    return learned
