"""From a dense model to a mixture of soft experts that starts with its weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
from torch import nn

from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.replace_mlps import sites_at
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter
from moee_analysis.baselines.jetpack.activation_profile import profile
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.baselines.jetpack.layer_sizes import LayerSize, size_layers
from moee_analysis.baselines.jetpack.narrow_model import successor
from moee_analysis.baselines.jetpack.recycling import Recycling
from moee_analysis.baselines.jetpack.sphero import ExpertDropout, SpheroRouter
from moee_analysis.baselines.jetpack.tensor_axes import classifier_of, narrow_tensors
from moee_analysis.data.images import ImageSet
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.moe.layer import replace_module


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

    Parameters
    ----------
    dense
        A plain vision transformer or ConvNeXt of timm's; it is not changed.
    images
        Calibration images; their labels are not used, nor are they looked at by the methods
        ``uniform`` and ``random``.
    store
        Folder where the sums over activations are kept and found again; None keeps nothing.

    Raises
    ------
    MoeeError
        Another kind of model, a width, layers or a budget that it cannot have.
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
