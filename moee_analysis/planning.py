"""What each layer can become: its experts, its router, its scored neurons; no size chosen yet."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np

from moee_analysis.activations import TokenPlan, prefix_tokens, record
from moee_analysis.clustering import NOISE
from moee_analysis.errors import MoeeError
from moee_analysis.models import find_mlps
from moee_analysis.partition import Partition, one_expert, partition
from moee_analysis.progress import progress
from moee_analysis.recorded import recorded_layer
from moee_analysis.routers import TokenKindRouter
from moee_analysis.scoring import Scores, score
from moee_analysis.store import content_key, kept
from moee_analysis.token_kinds import prefix_kinds, unread_patches

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch import nn

    from moee_analysis.activations import Activations
    from moee_analysis.config import ExtractConfig
    from moee_analysis.images import ImageSet
    from moee_analysis.models import MlpSite
    from moee_analysis.recorded import Recorded


@dataclass(frozen=True)
class LayerPlan:
    """Everything known about one layer before the size of its experts is chosen.

    Experts of leading tokens (``prefix``: the expert of each) come before those of the
    ``partition``. ``members`` is the expert that each row of the layer's sample counts for, -1 for
    none. ``shares`` (experts,) of the ``tokens`` of an image go to each; ``constant`` (experts,)
    marks those that keep no neuron. ``scores`` is None where the layer stays dense; those of the
    partition's experts have the factor ``coherence``.
    """

    site: MlpSite
    partition: Partition
    prefix: tuple[int, ...] = ()
    tokens: int = 0
    members: np.ndarray | None = None
    shares: np.ndarray | None = None
    constant: np.ndarray | None = None
    scores: Scores | None = None
    coherence: float = 1.0

    @property
    def converted(self) -> bool:
        """Whether this layer becomes a mixture of experts."""
        return self.scores is not None

    def kinds(self, layer: Recorded) -> list[np.ndarray]:
        """For each expert, the rows of the layer's sample of the kind of token it serves."""
        leading = layer.sample.position < len(self.prefix)
        own, others = np.flatnonzero(leading), np.flatnonzero(~leading)
        first = len(set(self.prefix))
        return [own] * first + [others] * self.partition.experts

    def router(self) -> nn.Module:
        """Return a new router of this layer."""
        router = self.partition.router()
        return TokenKindRouter(self.prefix, router, tokens=self.tokens) if self.prefix else router


def plan_layers(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> list[LayerPlan]:
    """Record, cluster and score the calibration tokens; one plan per MLP of the model."""
    wanted = _wanted(find_mlps(model), config.layers)
    activations = sampled(model, images, config, root=root)
    unread = unread_patches(model) if config.unread == "constant" else frozenset()
    kinds = _expert_of_each(prefix_kinds(model))
    left_out = Partition(reason="not asked for")
    plans = {site.index: LayerPlan(site, left_out) for site in find_mlps(model)}
    chosen = [plan.site for plan in plans.values() if plan.site.index in wanted]
    for site in progress(chosen, label="planning layers"):
        layer = recorded_layer(activations, model, site)
        prefix = kinds if config.tokens == "kinds" or site.name in unread else ()
        plans[site.index] = plan_layer(
            layer, config, prefix, unread=site.name in unread, root=root
        )  # fmt: skip
    return list(plans.values())


def sampled(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> Activations:
    """Record the tokens that ``config`` asks for, in all layers, or find them in the store."""
    tokens = TokenPlan(config.tokens_per_image, prefix_tokens(model), config.seed)
    kinds = ("inputs", "hidden")
    if config.needs_gradients:
        kinds = ("inputs", "gradients")
    elif config.tokens_per_image is None:  # too many to keep their hidden activations as well
        kinds = ("inputs",)
    return record(model, images, find_mlps(model), plan=tokens, root=root, kinds=kinds)


def plan_layer(
    layer: Recorded,
    config: ExtractConfig,
    prefix: tuple[int, ...] = (),
    *,
    unread: bool = False,
    root: Path,
) -> LayerPlan:
    """Divide one layer's tokens among experts, and score their neurons.

    Parameters
    ----------
    prefix
        Expert of each leading token that is not routed like the others.
    unread
        Nothing reads the outputs at the others: they share an expert that keeps no neuron.
    """
    others = np.flatnonzero(layer.sample.position >= len(prefix))
    if unread or config.experts == "one":
        divided = one_expert(len(others))
    else:
        divided = partition(layer, others, config, root=root)
    plan = LayerPlan(layer.site, divided, prefix, layer.tokens_per_image)
    return (
        plan if divided.reason else _scored(plan, layer, others, config, unread=unread, root=root)
    )


def _scored(
    plan: LayerPlan,
    layer: Recorded,
    others: np.ndarray,
    config: ExtractConfig,
    *,
    unread: bool,
    root: Path,
) -> LayerPlan:
    """Add to a plan how often its experts are used and what their neurons are worth."""
    first = len(set(plan.prefix))
    experts = first + plan.partition.experts
    routed = _with_prefix(layer, plan.prefix, others, plan.partition.routed)
    members = _with_prefix(layer, plan.prefix, others, plan.partition.members)
    weight = np.bincount(routed, weights=layer.sample.weight, minlength=experts)
    known = _kept_scores(layer, members, plan.kinds(layer), config, root=root)
    constant = (np.arange(experts) >= first) & unread
    return replace(
        plan, members=members, shares=weight / weight.sum(), constant=constant, scores=known
    )


def _kept_scores(
    layer: Recorded,
    members: np.ndarray,
    kinds: Sequence[np.ndarray],
    config: ExtractConfig,
    *,
    root: Path,
) -> Scores:
    """Score the neurons of all experts, or find the scores in the store."""
    named = {"order": config.order, "metric": config.metric}
    digest = hashlib.sha256(members.tobytes()).hexdigest()
    key = content_key(activations=layer.key, site=layer.site.name, members=digest, **named)

    def build(folder: Path) -> None:
        found = score(layer.mlp, layer.sample, members, kinds, **named)
        for name, values in vars(found).items():
            np.save(folder / f"{name}.npy", values)

    folder = kept(root, f"scores-{key}", build)
    return Scores(**{f.name: np.load(folder / f"{f.name}.npy") for f in fields(Scores)})


def _with_prefix(
    layer: Recorded, prefix: tuple[int, ...], others: np.ndarray, experts: np.ndarray
) -> np.ndarray:
    """Expert of every row of the sample, from the ``experts`` of the rows of ``others``."""
    position = layer.sample.position
    everywhere = np.full(len(position), NOISE)
    everywhere[others] = np.where(experts == NOISE, NOISE, experts + len(set(prefix)))
    leading = position < len(prefix)
    everywhere[leading] = np.array(prefix, dtype=np.int64)[position[leading]]
    return everywhere


def _expert_of_each(kinds: Sequence[str]) -> tuple[int, ...]:
    """Number the kinds of the leading tokens; tokens of one kind share an expert."""
    names = list(dict.fromkeys(kinds))
    return tuple(names.index(kind) for kind in kinds)


def _wanted(sites: Sequence[MlpSite], layers: tuple[int, ...] | None) -> set[int]:
    known = {site.index for site in sites}
    wanted = known if layers is None else set(layers)
    if not wanted or wanted - known:
        raise MoeeError(
            f"layers between 0 and {len(sites) - 1}", str(sorted(wanted - known) or "none"),
            "count layers from 0, as in timm's blocks.0",
        )  # fmt: skip
    return wanted
