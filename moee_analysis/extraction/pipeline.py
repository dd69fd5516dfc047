"""Extraction: a dense model and calibration images in, a mixture of experts out.

MoEE as published ("Efficient Data Driven Mixture-of-Expert Extraction from Trained Networks",
CVPR 2025), in the order of the paper: record, cluster, cut experts, route. What the paper leaves
open, and what is chosen here, stands in docs/paper.md.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention import plan_attentions, reduce_attention
from moee_analysis.extraction.budget import Budget, Scores, Sizes
from moee_analysis.extraction.cluster.clusters_to_router import (
    Partition,
    cluster_tokens,
    partition_tokens,
)
from moee_analysis.extraction.cluster.sample_tokens import TokenSample, sample_tokens
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import scale_by_coherence
from moee_analysis.extraction.experts.layer_experts import Kept, LayerExperts, gather_statistics
from moee_analysis.extraction.experts.neuron_scores import score_neurons
from moee_analysis.extraction.experts.refit_w2 import refit_layers
from moee_analysis.extraction.merging import merge_first, share_of_time
from moee_analysis.extraction.prices import Way, measure_prices
from moee_analysis.extraction.record.accumulate import saved_sums, share_out
from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.extraction.record.recording import check_unchanged
from moee_analysis.extraction.record.token_source import Limits, TokenSource, calibration_tokens
from moee_analysis.extraction.run import Extraction, describe_origin, through_store
from moee_analysis.extraction.saving.checks import LayerReport, report_mlp
from moee_analysis.extraction.time_budget import allocate_in_time
from moee_analysis.models.attention import plain_attentions
from moee_analysis.models.class_names import knows_classes, name_by_folders
from moee_analysis.models.fingerprints import copy_model, unchanged
from moee_analysis.models.loading import MlpSite, architecture, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.models.unwrapping import unwrapped
from moee_analysis.moe.layer import MoeMlp, replace_module
from moee_analysis.utils.environment import check_numba_cache
from moee_analysis.utils.progress import progress, tell
from moee_analysis.utils.storage.folders import scratch_folder


def extract(
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig | None = None,
    *,
    store: str | Path | None = None,
    limits: Limits | None = None,
) -> Extraction:
    """Convert ``model``, a dense timm model, into a mixture of experts, without training.

    It is not changed. One of half or double precision is looked at in single precision, and the
    mixture has its own again. Labels of the calibration ``images`` are not used. ``store`` is a
    folder in which activations, clusters and the result are kept and found again, where a run that
    was killed goes on; None keeps nothing. ``limits``: what it may take of memory and disk.

    Raises MoeeError: a model without values or of several precisions; no MLPs to convert, too few
    tokens, a budget that cannot be met, a full disk.
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
            run = through_store(extract_in, model, images, config, root=Path(store))
    return replace(run, original=model)


def _extract(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path, limits: Limits | None
) -> Extraction:
    """The method, step by step, with the store ``root``."""
    provenance = describe_origin(model, images, config)
    unmerged = _in_single_precision(model)

    # Merge first: all that follows is of the tokens that are left.
    precise = merge_first(unmerged, images, config, root=root)

    # Record: inputs, hidden activations or gradients of sampled tokens.
    tokens = calibration_tokens(precise, images, config, root=root, limits=limits)
    if not tokens.on_disk:
        tell("the disk has no room for the tokens: every pass over them runs the model again")
    with saved_sums(tokens):
        # What the dense model costs, and one budget, which attention can join.
        sites = [site.name for site in (*tokens.sites, *plain_attentions(precise))]
        dense = count(precise, sites=sites)
        attentions = plan_attentions(precise, images, config, dense=dense, root=root)
        budget = Budget(precise, dense, count(unmerged, sites=()).total, config, attentions)

        # Phase 1: cluster the tokens of every layer; each cluster is an expert.
        layers = group_tokens(tokens, config)

        # Phase 2: cut experts. Score neurons, and spend the budget where they are worth most.
        scores = score_neurons(tokens, layers, order=config.order, metric=config.metric)
        if config.budget_in == "time":
            ways = [Way("routed", layers, scores), prune_alike(tokens, config)]
            saved = share_of_time(unmerged, tokens, config)
            prices = measure_prices(tokens, ways, attentions, config, saved=saved)
            layers, sizes = allocate_in_time(tokens, ways, attentions, prices, config)
        else:
            sizes = _allocate(tokens, layers, scores, budget)

        # Phase 3: route every token to its expert.
        moe = build_moe(tokens, layers, sizes.neurons, refit=config.refit)
        reduce_attention(moe, attentions, sizes.modes)
        check_unchanged(tokens)

    reports = tuple(_report(layer, moe) for layer in layers)
    moe.to(next(model.parameters()).dtype)
    if not knows_classes(model):
        name_by_folders(moe, images.classes)
    return Extraction(moe, config, sizes.variance_kept, reports, provenance)


def _allocate(
    tokens: TokenSource, layers: Sequence[LayerExperts], scores: Scores, budget: Budget
) -> Sizes:
    """Choose neurons and modes by a budget of MACs, parameters or shares."""
    sizes = budget.allocate(layers, scores)
    if budget.config.measures_coherence:
        scores = scale_by_coherence(tokens, layers, scores, sizes.neurons)
        sizes = budget.allocate(layers, scores)
    return sizes


def _in_single_precision(model: nn.Module) -> nn.Module:
    """The model, or a copy: sums over tokens in half precision would be wrong."""
    single = next(model.parameters()).dtype == torch.float32
    return model if single else copy.deepcopy(model).float()


def group_tokens(tokens: TokenSource, config: ExtractConfig) -> list[LayerExperts]:
    """Cluster the tokens of every MLP, and gather statistics of the experts that get any."""
    layers, leading = describe_layers(tokens, config), {}
    for layer in layers:
        others = tokens.whole.kept[layer.site.name] - len(layer.prefix)
        alone = layer.unread or config.experts == "one"
        if others > 0 and not alone and not layer.partition.reason:
            leading[layer.site.name] = len(layer.prefix)
    partitions = _cluster(tokens, config, leading)
    layers = [replace(e, partition=partitions.get(e.site.name, e.partition)) for e in layers]
    assignments = {e.site.name: e.assignment for e in layers if not e.partition.reason}
    statistics = gather_statistics(tokens, assignments, gradients=config.needs_gradients)
    for number, layer in enumerate(layers):
        if own := statistics.get(layer.site.name):
            partition = layer.assignment.alive(own.routed).partition
            alive = (own.routed > 0) | (partition.centres is None)
            own = None if partition.reason else own.of(alive)
            layers[number] = replace(layer, partition=partition, statistics=own)
    return layers


def prune_alike(tokens: TokenSource, config: ExtractConfig) -> Way:
    """Have the same neurons for all tokens of a layer, of which only the leading ones are told."""
    layers = group_tokens(tokens, replace(config, experts="one"))
    scores = score_neurons(tokens, layers, order=config.order, metric=config.metric)
    return Way("pruned", layers, scores, alike=True)


def describe_layers(tokens: TokenSource, config: ExtractConfig) -> list[LayerExperts]:
    """Describe every layer without a look at its tokens."""
    known = {site.index for site in tokens.sites}
    wanted = known if config.layers is None else set(config.layers)
    if not wanted or wanted - known:
        expected = f"layers between 0 and {len(known) - 1}"
        hint = "count layers from 0, as in timm's blocks.0"
        raise MoeeError(expected, str(sorted(wanted - known) or "none"), hint)
    unread = unread_patches(tokens.model) if config.unread == "constant" else frozenset()
    layers = []
    for site in tokens.sites:
        is_unread = site.name in unread
        prefix = prefix_experts(tokens, site, config, unread=is_unread)
        partition = Partition(reason="" if site.index in wanted else "not asked for")
        count = tokens.whole.tokens[site.name]
        layers.append(LayerExperts(site, count, prefix, unread=is_unread, partition=partition))
    return layers


def prefix_experts(
    tokens: TokenSource, site: MlpSite, config: ExtractConfig, *, unread: bool = False
) -> tuple[int, ...]:
    """Expert of each leading token of a layer, one for each kind; () where none has its own."""
    kinds = tokens.leading[site.name] if config.tokens == "kinds" or unread else ()
    names = list(dict.fromkeys(kinds))
    return tuple(names.index(kind) for kind in kinds)


def _cluster(
    tokens: TokenSource, config: ExtractConfig, leading: Mapping[str, int]
) -> dict[str, Partition]:
    """Divide the tokens after so many ``leading`` ones of an image among experts, by site name."""
    samples: list[TokenSample] = []

    def draw() -> Iterator[TokenSample]:
        found = sample_tokens(tokens, config, leading)
        for sample in progress(found, label="clustering layers", total=len(leading)):
            samples.append(replace(sample, hidden=None))  # too large to be held for all layers
            yield sample

    def label(sample: TokenSample) -> torch.Tensor:
        return torch.from_numpy(cluster_tokens(sample, config, root=tokens.root)).long()

    labels = share_out(draw(), label, lambda s: torch.zeros(len(s.rows), dtype=torch.int64))
    pairs = zip(samples, labels, strict=True)
    return {s.site.name: partition_tokens(s, own.numpy(), config) for s, own in pairs}


def build_moe(
    tokens: TokenSource, layers: Sequence[LayerExperts], kept: Kept, *, refit: str
) -> nn.Module:
    """Copy the calibrated model with its converted layers replaced by mixtures of experts."""
    moe = copy.deepcopy(tokens.model)
    layers = [layer for layer in layers if layer.converted]
    readouts = refit_layers(tokens, layers, kept, refit=refit)
    for layer in layers:
        name, mlp = layer.site.name, layer.site.module(moe)
        experts = [np.flatnonzero(of_expert) for of_expert in kept[name]]
        routed = MoeMlp(mlp, layer.router(), experts, layer.statistics.shares, readouts.get(name))
        replace_module(moe, name, routed.to(mlp.fc1.weight.device))
    return moe.eval()


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be converted: no values or several precisions, no MLPs, no copy of it."""
    types = {p.dtype for p in model.parameters()}
    if len(types) != 1 or any(p.is_meta for p in model.parameters()):
        found = "tensors without values (meta)" if len(types) == 1 else f"{len(types)} of them"
        hint = "load its weights; convert it as a whole, as by model.float()"
        raise MoeeError("a model with weights of one precision", found, hint)
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
