"""Phase 1: the experts of every layer, which tokens go to each, and statistics of these."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.clusters_to_router import (
    Partition,
    cluster_tokens,
    partition_tokens,
)
from moee_analysis.extraction.cluster.sample_tokens import TokenSample, sample_tokens
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.experts.layer_experts import LayerExperts, gather_statistics
from moee_analysis.extraction.record.accumulate import share_out
from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.progress import progress

UNASKED = "not asked for"


def group_tokens(tokens: TokenSource, config: ExtractConfig) -> list[LayerExperts]:
    """Cluster the tokens of every MLP of the model, and gather statistics of each expert's.

    Experts that get no tokens are left out; a single one stays in any case.
    """
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


def describe_layers(tokens: TokenSource, config: ExtractConfig) -> list[LayerExperts]:
    """Describe every layer without a look at its tokens."""
    known = {site.index for site in tokens.sites}
    wanted = known if config.layers is None else set(config.layers)
    if not wanted or wanted - known:
        raise MoeeError(
            f"layers between 0 and {len(known) - 1}", str(sorted(wanted - known) or "none"),
            "count layers from 0, as in timm's blocks.0",
        )  # fmt: skip
    unread = unread_patches(tokens.model) if config.unread == "constant" else frozenset()
    return [
        LayerExperts(
            site,
            tokens.whole.tokens[site.name],
            prefix_experts(tokens, site, config, unread=site.name in unread),
            unread=site.name in unread,
            partition=Partition(reason="" if site.index in wanted else UNASKED),
        )
        for site in tokens.sites
    ]


def prefix_experts(
    tokens: TokenSource, site: MlpSite, config: ExtractConfig, *, unread: bool = False
) -> tuple[int, ...]:
    """Expert of each leading token of a layer; tokens of one kind share it, () where none has one.

    Where the patches are ``unread``, leading tokens have their own in any case.
    """
    if config.tokens != "kinds" and not unread:
        return ()
    kinds = tokens.leading[site.name]
    names = list(dict.fromkeys(kinds))
    return tuple(names.index(kind) for kind in kinds)


def _cluster(
    tokens: TokenSource, config: ExtractConfig, leading: Mapping[str, int]
) -> dict[str, Partition]:
    """Divide tokens among experts, by site name.

    ``leading`` tokens of every image, by site name, have experts of their own.
    """
    samples: list[TokenSample] = []

    def draw() -> Iterator[TokenSample]:
        found = sample_tokens(tokens, config, leading)
        for sample in progress(found, label="clustering layers", total=len(leading)):
            samples.append(replace(sample, hidden=None))  # too large to be held for all layers
            yield sample

    def label(sample: TokenSample) -> torch.Tensor:
        return torch.from_numpy(cluster_tokens(sample, config, root=tokens.root)).long()

    labels = share_out(draw(), label, lambda s: torch.zeros(len(s.rows), dtype=torch.int64))
    return {
        sample.site.name: partition_tokens(sample, own.numpy(), config)
        for sample, own in zip(samples, labels, strict=True)
    }
