"""From a dense model to a mixture of soft experts that starts with its weights.

A layer costs its experts, slot by slot, and three products of all tokens with all slots: logits,
dispatch and combine. The paper leaves these out of its FLOPs; here they count.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from moee_analysis.baselines.common.replace_mlps import ExpertMlps, fill_budget, sites_at
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter
from moee_analysis.baselines.jetpack.activation_profile import profile
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.narrow_model import classifier_of, narrow_tensors, successor
from moee_analysis.baselines.jetpack.recycling import Recycling
from moee_analysis.baselines.jetpack.sphero import ExpertDropout, SpheroRouter
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import MacCount, count
from moee_analysis.moe.layer import replace_module

UNIVERSAL_PER_CORE = 2  # as published


@dataclass(frozen=True)
class LayerSize:
    """Experts of a layer, and slots of each of them."""

    core: int
    universal: int
    slots: int = 1

    @property
    def experts(self) -> int:
        """Experts of both kinds."""
        return self.core + self.universal

    def macs(self, site: MlpSite, tokens: int, ratio: float) -> int:
        """MACs of the layer at ``site`` for an image of so many tokens."""
        small = max(1, round(ratio * site.hidden))
        hidden = self.core * site.hidden + self.universal * small
        return self.slots * site.dim * (2 * hidden + 3 * tokens * self.experts)


def size_layers(
    model: nn.Module, sites: Sequence[MlpSite], config: JetpackConfig, *, dense: nn.Module
) -> dict[str, LayerSize]:
    """Size of every layer of ``model``, which still has MLPs there, by its name.

    A budget is a share of the MACs of ``dense``.

    Raises ``MoeeError``: a budget that cannot be met, or one of a narrower model.
    """
    if config.macs_reduction is None and config.core is not None:
        given = LayerSize(config.core, config.universal, config.slots)
        return {site.name: given for site in sites}
    counted = count(model)
    if config.macs_reduction is None:
        leading = getattr(model, "num_prefix_tokens", 0)
        cores = {s.name: max(1, (counted.tokens[s.name] - leading) // 2) for s in sites}
        return {n: LayerSize(c, UNIVERSAL_PER_CORE * c, config.slots) for n, c in cores.items()}
    if model.num_features != dense.num_features:
        raise MoeeError(
            "a MACs reduction at the dense model's width",
            f"macs_reduction={config.macs_reduction} at width {model.num_features}",
            "leave the width as it is, or choose core, universal and slots",
        )
    return _within_budget(counted, sites, config, total=count(dense).total)


def _within_budget(
    counted: MacCount, sites: Sequence[MlpSite], config: JetpackConfig, *, total: int
) -> dict[str, LayerSize]:
    """As many slots of every expert, or experts of one slot, as a budget allows."""
    tokens = [counted.tokens[site.name] for site in sites]
    own = zip(sites, tokens, strict=True)
    costs = [_grow(config, 1).macs(site, each, config.universal_ratio) for site, each in own]
    outside = counted.replacing({site.name: 0 for site in sites})
    counts = fill_budget(config.macs_reduction, costs, tokens, dense=total, fixed=outside)
    return {site.name: _grow(config, n) for site, n in zip(sites, counts, strict=True)}


def _grow(config: JetpackConfig, steps: int) -> LayerSize:
    """So many slots of every expert or, without numbers of these, core experts and their others."""
    if config.core is None:
        return LayerSize(steps, UNIVERSAL_PER_CORE * steps)
    return LayerSize(config.core, config.universal, steps)


def convert(
    dense: nn.Module,
    images: ImageSet,
    config: JetpackConfig | None = None,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Make the start of a mixture of soft experts of ``dense``, to be trained.

    In some of its layers a :class:`SlotMlp` stands in the place of the MLP: core experts, then
    universal ones, both cut from the dense MLP. Before training it predicts next to nothing.

    - ``dense``: a plain vision transformer or ConvNeXt of timm's; it is not changed.
    - ``images``: calibration images; their labels are not used, nor are they looked at by the
      methods ``uniform`` and ``random``.
    - ``store``: folder where the sums over activations are kept and found again; None keeps
      nothing.

    Raises ``MoeeError``: another kind of model, a width, layers or a budget that it cannot have.
    """
    recycling = _begin(dense, images, config or JetpackConfig(), store)
    config, model = recycling.config, recycling.narrow
    mlps = find_mlps(model)
    second_half = range(len(mlps) // 2, len(mlps))
    sites = sites_at(mlps, second_half if config.layers is None else config.layers)
    sizes = size_layers(model, sites, config, dense=dense)
    depth = max(1, len(mlps) - 1)
    layers = {s.name: _layer(recycling, s, sizes[s.name], s.index / depth) for s in sites}
    _fill_dense_part(recycling)
    for name, layer in layers.items():
        replace_module(model, name, layer)
    like = next(dense.parameters())
    return model.eval().requires_grad_(like.requires_grad).to(like.device, like.dtype)


def narrowed(
    dense: nn.Module,
    images: ImageSet,
    config: JetpackConfig | None = None,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Narrow ``dense`` to the width of ``config``, without experts (weight selection).

    It is the dense part that :func:`convert` puts experts into, and a baseline of its own. The
    arguments and errors are those of :func:`convert`.

    Source: Xu et al., "Initializing Models with Larger Ones", ICLR 2024.
    """
    recycling = _begin(dense, images, config or JetpackConfig(), store)
    _fill_dense_part(recycling)
    return recycling.narrow


def _begin(
    dense: nn.Module, images: ImageSet, config: JetpackConfig, store: str | Path | None
) -> Recycling:
    """The narrow model, still fresh, and what activations say where they decide anything."""
    model = successor(dense, config.width, seed=config.seed, num_classes=config.num_classes)
    found, graph = None, config.method == "graph"
    if graph or config.method == "importance":
        found = profile(dense, images, together=graph, store=store)
    return Recycling(dense, model, found, config)


def _fill_dense_part(recycling: Recycling) -> None:
    """Give the narrow model its dense part; a fresh classifier stays as it is."""
    model, head = recycling.narrow, classifier_of(recycling.narrow)
    tensors = narrow_tensors(recycling.dense, recycling.shared_units)
    if recycling.config.head == "fresh":
        own = model.state_dict()
        tensors |= {name: own[name] for name in own if name.rpartition(".")[0] == head}
    model.load_state_dict(tensors)


def _layer(recycling: Recycling, site: MlpSite, size: LayerSize, depth: float) -> SlotMlp:
    """Experts in the place of the narrow model's MLP at ``site``, at a ``depth`` of 0 to 1."""
    config, act = recycling.config, site.module(recycling.dense).act
    groups = recycling.cut_experts(site, core=size.core, universal=size.universal)
    experts = [ExpertMlps(group, copy.deepcopy(act), drop=config.drop) for group in groups]
    of_images = config.expert_drop_mode == "sample"
    dropout = ExpertDropout(depth * config.expert_drop, of_images=of_images)
    return SlotMlp(_router(config, site, size), experts, slots=size.slots, drop=dropout)


def _router(config: JetpackConfig, site: MlpSite, size: LayerSize) -> nn.Module:
    seed = int(np.random.default_rng([config.seed, 2, site.index]).integers(2**31))
    if config.router == "soft":
        noise = config.noise or 0.0
        return SoftRouter(site.dim, size.experts, slots=size.slots, noise=noise, seed=seed)
    return SpheroRouter(
        site.dim,
        size.experts,
        slots=size.slots,
        temperature=config.temperature,
        combine=config.combine,
        normalize_key=config.normalize_key,
        noise=config.noise,
        seed=seed,
    )
