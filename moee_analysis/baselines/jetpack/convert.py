"""From a dense model to a mixture of soft experts that starts with its weights.

A layer costs its experts, slot by slot, and three products of all tokens with all slots: logits,
dispatch and combine. The paper leaves these out of its FLOPs; here they count.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from torch import nn

from moee_analysis.baselines.common import exchange
from moee_analysis.baselines.common import soft_moe_layer as soft
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.narrow_model import CLASSIFIERS, narrow_tensors, successor
from moee_analysis.baselines.jetpack.recycling import Recycling, profile
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count

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
) -> list[LayerSize]:
    """Size of every layer of ``model`` at ``sites``, which still has MLPs there.

    A budget of MACs buys slots of every expert or, without numbers of these, core experts and the
    universal ones that go with them.

    Raises ``MoeeError``: a budget that cannot be met, or one of a narrower model.
    """

    def grow(steps: int) -> LayerSize:
        if config.core is None:
            return LayerSize(steps, UNIVERSAL_PER_CORE * steps, config.slots)
        return LayerSize(config.core, config.universal, steps)

    saved = config.macs_reduction
    if saved is None and config.core is not None:
        return [grow(config.slots)] * len(sites)
    counted = count(model)
    tokens = [counted.tokens[site.name] for site in sites]
    if saved is None:
        leading = getattr(model, "num_prefix_tokens", 0)
        counts = [max(1, (each - leading) // 2) for each in tokens]
    elif model.num_features != dense.num_features:
        raise MoeeError(
            "a MACs reduction at the dense model's width",
            f"macs_reduction={saved} at width {model.num_features}",
            "leave the width as it is, or choose core, universal and slots",
        )
    else:
        each = zip(sites, tokens, strict=True)
        costs = [grow(1).macs(site, number, config.universal_ratio) for site, number in each]
        total, fixed = count(dense).total, counted.replacing({site.name: 0 for site in sites})
        counts = exchange.fill_budget(saved, costs, tokens, dense=total, fixed=fixed)
    return [grow(steps) for steps in counts]


def convert(
    dense: nn.Module, images: ImageSet, config: JetpackConfig, *, store: exchange.Store = None
) -> nn.Module:
    """Make the start of a mixture of soft experts of ``dense``, to be trained.

    In some layers a :class:`SlotMlp` takes the MLP's place: core experts, then universal ones, both
    cut from the dense MLP. Before training it predicts next to nothing. The methods ``uniform`` and
    ``random`` do not look at the calibration ``images``; the ``store`` keeps sums of activations.

    Raises ``MoeeError``: a model that is no plain vision transformer or ConvNeXt of timm's, or a
    width, layers or a budget that it cannot have.
    """
    recycling = _recycle(dense, images, config, store)
    mlps = find_mlps(recycling.narrow)
    sites = exchange.sites_at(mlps, config.layers, first=len(mlps) // 2)
    sizes = zip(sites, size_layers(recycling.narrow, sites, config, dense=dense), strict=True)
    make_layer = partial(_make_layer, recycling, mlps[-1])
    return exchange.replace_mlps(recycling.narrow, sizes, make_layer)


def narrowed(
    dense: nn.Module, images: ImageSet, config: JetpackConfig, *, store: exchange.Store = None
) -> nn.Module:
    """Narrow ``dense``, as :func:`convert` does, and put no experts into it (weight selection).

    Source: Xu et al., "Initializing Models with Larger Ones", ICLR 2024.
    """
    return _recycle(dense, images, config, store).narrow


def _recycle(
    dense: nn.Module, images: ImageSet, config: JetpackConfig, store: exchange.Store
) -> Recycling:
    """Give a narrow model its dense part, by activations where they decide anything."""
    model = successor(dense, config.width, seed=config.seed)
    found, graph = None, config.method == "graph"
    if graph or config.method == "importance":
        found = profile(dense, images, together=graph, store=store)
    recycling = Recycling(dense, model, found, config)
    tensors = narrow_tensors(dense, recycling.shared_units)
    if config.head == "fresh":
        own = model.state_dict().items()
        tensors |= {n: tensor for n, tensor in own if n.rpartition(".")[0] in CLASSIFIERS}
    model.load_state_dict(tensors)
    return recycling


def _make_layer(
    recycling: Recycling, last: MlpSite, site: MlpSite, size: LayerSize, mlp: nn.Module
) -> soft.SlotMlp:
    """Experts in the place of the narrow model's ``mlp`` at ``site``."""
    config = recycling.config
    groups = recycling.cut_experts(site, core=size.core, universal=size.universal)
    experts = [exchange.ExpertMlps(group, mlp.act, drop=config.drop) for group in groups]
    drop = site.index / max(1, last.index) * config.expert_drop
    seed = int(np.random.default_rng([config.seed, 2, site.index]).integers(2**31))
    facts = {"slots": size.slots, "seed": seed}
    if config.router == "soft":
        router = soft.SoftRouter(site.dim, size.experts, noise=config.noise or 0.0, **facts)
    else:
        facts |= {"temperature": config.temperature, "noise": config.noise}
        router = soft.SpheroRouter(site.dim, size.experts, **facts)
    return soft.SlotMlp(router, experts, slots=size.slots, drop=drop)
