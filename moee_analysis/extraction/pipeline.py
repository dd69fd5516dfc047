"""Extraction: a dense model and calibration images in, a mixture of experts out.

MoEE as published ("Efficient Data Driven Mixture-of-Expert Extraction from Trained Networks",
CVPR 2025), in the order of the paper: record, cluster, cut experts, route. What the paper leaves
open, and what is chosen here, stands in docs/paper.md.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention import plan_attentions, reduce_attention
from moee_analysis.extraction.budget import Budget
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import scale_by_coherence
from moee_analysis.extraction.experts.layer_experts import Kept, LayerExperts
from moee_analysis.extraction.experts.neuron_scores import score_neurons
from moee_analysis.extraction.experts.refit_w2 import refit_layers
from moee_analysis.extraction.plan import group_tokens
from moee_analysis.extraction.record.accumulate import saved_sums
from moee_analysis.extraction.record.recording import check_unchanged
from moee_analysis.extraction.record.token_source import Limits, TokenSource, calibration_tokens
from moee_analysis.extraction.run import Extraction, describe_origin, through_store
from moee_analysis.extraction.saving.schema import LayerReport
from moee_analysis.extraction.saving.tables import report_mlp
from moee_analysis.models.attention import plain_attentions
from moee_analysis.models.class_names import knows_classes, name_by_folders
from moee_analysis.models.fingerprints import copy_model, unchanged
from moee_analysis.models.loading import architecture, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.models.unwrapping import unwrapped
from moee_analysis.moe.layer import MoeMlp, replace_module
from moee_analysis.utils.environment import check_numba_cache
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.folders import scratch_folder


def extract(
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig | None = None,
    *,
    store: str | Path | None = None,
    limits: Limits | None = None,
) -> Extraction:
    """Convert ``model`` into a mixture of experts, without training.

    Parameters
    ----------
    model
        A dense timm model, wrapped or not; it is not changed. One of half or double precision is
        looked at in single precision, and the mixture has its own again.
    images
        Calibration images; their labels are not used.
    store
        Folder in which activations, clusters and the result are kept and found again; a run that
        was killed goes on there. None keeps nothing.
    limits
        What it may take of memory and disk.

    Raises
    ------
    MoeeError
        A model without values or of several precisions; no MLPs to convert, too few tokens, a
        budget that cannot be met, a full disk.
    """
    config = (config or ExtractConfig()).resolved()
    model = unwrapped(model)
    check_model(model)
    if config.clustering.reduce == "umap":
        check_numba_cache()
    images = images.limit(config.calibration_images, seed=config.seed)
    extract_in = partial(_extract, model, images, config, limits=limits)
    with unchanged(model):
        if store is None:
            with scratch_folder("store") as root:
                run = extract_in(root=root)
        else:
            root = Path(store)
            run = through_store(partial(extract_in, root=root), model, images, config, root=root)
    return replace(run, original=model)


def _extract(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path, limits: Limits | None
) -> Extraction:
    """The method, step by step, with the store ``root``."""
    provenance = describe_origin(model, images, config)
    precise = model
    if next(model.parameters()).dtype != torch.float32:
        precise = copy.deepcopy(model).float()  # sums over tokens in half precision would be wrong

    # Record: inputs, hidden activations or gradients of sampled tokens.
    tokens = calibration_tokens(precise, images, config, root=root, limits=limits)
    if not tokens.on_disk:
        tell("the disk has no room for the tokens: every pass over them runs the model again")
    with saved_sums(tokens):
        # What the dense model costs, and one budget, which attention can join.
        sites = [site.name for site in (*tokens.sites, *plain_attentions(precise))]
        dense = count(precise, sites=sites)
        attentions = plan_attentions(precise, images, config, dense=dense, root=root)
        budget = Budget(precise, dense, config, attentions)

        # Phase 1: cluster the tokens of every layer; each cluster is an expert.
        layers = group_tokens(tokens, config)

        # Phase 2: cut experts. Score neurons, and spend the budget where they are worth most.
        scores = score_neurons(tokens, layers, order=config.order, metric=config.metric)
        sizes = budget.allocate(layers, scores)
        if config.measures_coherence:
            scores = scale_by_coherence(tokens, layers, scores, sizes.neurons)
            sizes = budget.allocate(layers, scores)

        # Phase 3: route every token to its expert.
        moe = build_moe(tokens, layers, sizes.neurons, refit=config.refit)
        reduce_attention(moe, attentions, sizes.modes)
        check_unchanged(tokens)

    reports = tuple(_report(layer, moe) for layer in layers)
    moe.to(next(model.parameters()).dtype)
    if not knows_classes(model):
        name_by_folders(moe, images.classes)
    return Extraction(moe, config, sizes.variance_kept, reports, provenance)


def build_moe(
    tokens: TokenSource, layers: Sequence[LayerExperts], kept: Kept, *, refit: str
) -> nn.Module:
    """Copy the calibrated model with its converted layers replaced by mixtures of experts."""
    moe = copy.deepcopy(tokens.model)
    device = next(moe.parameters()).device
    layers = [layer for layer in layers if layer.converted]
    readouts = refit_layers(tokens, layers, kept, refit=refit)
    for layer in layers:
        name, mlp = layer.site.name, layer.site.module(moe)
        experts = [np.flatnonzero(of_expert) for of_expert in kept[name]]
        shares = layer.statistics.shares
        routed = MoeMlp(mlp, layer.router(), experts, shares, readouts.get(name))
        replace_module(moe, name, routed.to(device))
    return moe.eval()


def convert(
    dense: nn.Module,
    images: ImageSet,
    config: ExtractConfig | None = None,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Return the model of :func:`extract` alone: the interface that all systems share."""
    return extract(dense, images, config, store=store).model


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be converted, before anything is computed.

    Raises MoeeError: it holds no values (on the device "meta") or several precisions; it has no
    MLPs to convert, or no ``pretrained_cfg`` that names its architecture; it cannot be copied.
    """
    types = {p.dtype for p in model.parameters()}
    if len(types) != 1 or any(p.is_meta for p in model.parameters()):
        found = "tensors without values (meta)" if len(types) == 1 else f"{len(types)} of them"
        raise MoeeError(
            "a model with weights of one precision", found,
            "load its weights; convert it as a whole, as by model.float()",
        )  # fmt: skip
    find_mlps(model)
    architecture(model)
    copy_model(model)  # of which the mixture is made at the end


def _report(layer: LayerExperts, moe: nn.Module) -> LayerReport:
    """What became of a layer, in the model that was made."""
    site, partition = layer.site, layer.partition
    report = report_mlp(site.index, site.name, site.module(moe))
    told = {"reason": partition.reason, "noise_share": partition.noise_share}
    if layer.converted:  # by the exact shares, which the layer has rounded
        active = float(layer.statistics.shares @ report.sizes) / site.hidden
        told |= {"route_agreement": partition.route_agreement, "active_fraction": active}
    return replace(report, **told)
