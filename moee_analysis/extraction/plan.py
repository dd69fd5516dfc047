"""What each layer can become: its experts, its router, its scored neurons; no size chosen yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.assignment import Assignment
from moee_analysis.extraction.cluster.clusters_to_router import (
    Partition,
    cluster_tokens,
    partition_tokens,
)
from moee_analysis.extraction.cluster.sample_tokens import sample_tokens
from moee_analysis.extraction.experts.expert_statistics import ExpertStatistics, gathered
from moee_analysis.extraction.experts.neuron_scores import Scores, eliminated, score
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.token_kinds import unread_patches
from moee_analysis.models.loading import MlpSite
from moee_analysis.moe.routers import TokenKindRouter
from moee_analysis.utils.distributed import agreed, all_sum, processes, rank
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key, get_or_build, present

UNASKED = "not asked for"


@dataclass(frozen=True)
class LayerPlan:
    """Everything known about one layer before the size of its experts is chosen.

    Experts of leading tokens (``prefix``: the expert of each) come before those of the
    ``partition``. ``tokens`` of an image pass through the layer; where it is ``unread``, nothing
    reads the outputs at the others; where it is ``thin``, it stays dense because experts would save
    too little. ``known`` and ``scores`` are None where the layer stays
    dense; the scores of the partition's experts have the factor ``coherence``. ``kinds`` are those
    of the experts of leading tokens; tokens of the kinds in ``dense``, "patch" among them for all
    others, keep all neurons.
    """

    site: MlpSite
    partition: Partition
    prefix: tuple[int, ...] = ()
    tokens: int = 0
    unread: bool = False
    known: ExpertStatistics | None = None
    scores: Scores | None = None
    coherence: float = 1.0
    thin: bool = False
    kinds: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()

    @property
    def converted(self) -> bool:
        """Whether this layer becomes a mixture of experts."""
        return self.scores is not None

    @property
    def assignment(self) -> Assignment:
        """Which expert every token of the layer goes to."""
        return Assignment(self.prefix, self.partition)

    @property
    def shares(self) -> np.ndarray:
        """Share of the tokens that goes to each expert, (experts,)."""
        return self.known.routed / self.known.routed.sum()

    @property
    def constant(self) -> np.ndarray:
        """Which experts keep no neuron, bool (experts,): those of tokens that nothing reads."""
        return (self.assignment.kinds == 1) & self.unread

    @property
    def whole(self) -> np.ndarray:
        """Which experts keep all neurons, bool (experts,): those of tokens that are kept dense."""
        kinds = [*self.kinds, *["patch"] * self.partition.experts]
        return np.array([kind in self.dense for kind in kinds])

    def router(self) -> nn.Module:
        """Return a new router of this layer."""
        router = self.partition.router()
        return TokenKindRouter(self.prefix, router, tokens=self.tokens) if self.prefix else router


def plan_layers(calibration: Calibration) -> list[LayerPlan]:
    """Cluster and score the calibration tokens; one plan per MLP of the model."""
    plans = {plan.site.name: plan for plan in _asked_for(calibration)}
    leading = {
        name: len(plan.prefix) for name, plan in plans.items() if _needs_clusters(plan, calibration)
    }
    for name, found in _partitions(calibration, leading).items():
        plans[name] = replace(plans[name], partition=found)
    plans |= _with_statistics(calibration, _feasible(plans))
    plans |= _with_scores(calibration, _feasible(plans))
    return list(plans.values())


def _asked_for(calibration: Calibration) -> list[LayerPlan]:
    """What is known of every layer without a look at its tokens."""
    config, sites = calibration.config, calibration.sites
    wanted = _wanted(sites, config.layers)
    unread = frozenset()
    if config.unread == "constant" and "patch" not in config.dense_tokens:
        unread = unread_patches(calibration.model)
    plans = [_blank(calibration, site, unread=site.name in unread) for site in sites]
    _check_dense_tokens(calibration, [plan for plan in plans if plan.site.index in wanted])
    return [
        plan if plan.site.index in wanted else replace(plan, partition=Partition(reason=UNASKED))
        for plan in plans
    ]


def _blank(calibration: Calibration, site: MlpSite, *, unread: bool) -> LayerPlan:
    """A layer of which only the kinds of its tokens are known."""
    tokens, seen = calibration.tokens_per_image[site.name], calibration.leading[site.name]
    prefix = prefix_experts(calibration, site, unread=unread)
    dense = tuple(k for k in calibration.config.dense_tokens if k in _kinds(calibration, site))
    all_dense = set(_kinds(calibration, site)) <= set(dense)
    return LayerPlan(
        site,
        Partition(reason="all of its tokens are kept dense" if all_dense else ""),
        prefix,
        tokens,
        unread,
        kinds=tuple(dict.fromkeys(seen)) if prefix else (),
        dense=dense,
    )


def _kinds(calibration: Calibration, site: MlpSite) -> tuple[str, ...]:
    """The kinds of all tokens that a layer sees, each once."""
    leading = calibration.leading[site.name]
    patches = calibration.tokens_per_image[site.name] > len(leading)
    return (*dict.fromkeys(leading), *(["patch"] if patches else []))


def _check_dense_tokens(calibration: Calibration, plans: Sequence[LayerPlan]) -> None:
    """Refuse to keep dense what there is not, or all there is."""
    wanted = calibration.config.dense_tokens
    seen = dict.fromkeys(kind for plan in plans for kind in _kinds(calibration, plan.site))
    unknown = [kind for kind in wanted if kind not in seen]
    if unknown:
        raise MoeeError(
            f"dense_tokens among those that the layers see ({', '.join(seen)})",
            f"'{unknown[0]}'", "leave it out",
        )  # fmt: skip
    if all(plan.partition.reason for plan in plans):
        raise MoeeError(
            "tokens that are left to experts",
            f"all kinds that the layers see ({', '.join(seen)}) among dense_tokens",
            "keep fewer kinds dense",
        )


def _needs_clusters(plan: LayerPlan, calibration: Calibration) -> bool:
    """Whether there are tokens to be divided among several experts."""
    others = calibration.kept_per_image[plan.site.name] - len(plan.prefix)
    alone = plan.unread or "patch" in plan.dense or calibration.config.experts == "one"
    return not plan.partition.reason and not alone and others > 0


def _feasible(plans: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    return {name: plan for name, plan in plans.items() if not plan.partition.reason}


def _partitions(calibration: Calibration, leading: Mapping[str, int]) -> dict[str, Partition]:
    """Divide tokens among experts, by site name; several processes share the clustering.

    ``leading`` tokens of every image, by site name, have experts of their own.
    """
    config, found = calibration.config, []
    draws = progress(
        sample_tokens(calibration, leading), label="clustering layers", total=len(leading)
    )
    for number, draw in enumerate(draws):
        labels = torch.zeros(len(draw.rows), dtype=torch.int64)
        if number % processes() == rank():
            labels += torch.from_numpy(cluster_tokens(draw, config, root=calibration.root))
        found.append((replace(draw, hidden=None), labels))
    return {
        draw.site.name: partition_tokens(draw, all_sum(labels).numpy(), config)
        for draw, labels in found
    }


def _with_statistics(
    calibration: Calibration, plans: Mapping[str, LayerPlan]
) -> dict[str, LayerPlan]:
    """Add what is known of the experts' tokens; leave out experts that get none."""
    known = gathered(calibration, {name: plan.assignment for name, plan in plans.items()})
    found = {}
    for name, plan in plans.items():
        alive = known[name].routed > 0
        alive |= plan.partition.centres is None  # a single expert stays, with tokens or without
        divided = plan.assignment.alive(known[name].routed).partition
        found[name] = replace(plan, partition=divided)
        if not divided.reason:
            found[name] = replace(found[name], known=known[name].of(alive))
    return found


def _with_scores(calibration: Calibration, plans: Mapping[str, LayerPlan]) -> dict[str, LayerPlan]:
    """Add the scores of the neurons of every expert."""
    order, costs = calibration.config.order, {}
    if order == "obs":
        costs = _kept_costs(calibration, plans)
    return {
        name: replace(
            plan,
            scores=score(
                plan.site.module(calibration.model), plan.known, order=order, costs=costs.get(name)
            ),
        )
        for name, plan in progress(plans.items(), label="scoring neurons")
    }


def _kept_costs(calibration: Calibration, plans: Mapping[str, LayerPlan]) -> dict[str, np.ndarray]:
    """Costs of elimination by site name, computed or found in the store."""
    facts = {"tokens": calibration.key, "metric": calibration.config.metric}
    folders = {}
    for name, plan in plans.items():
        key = content_key(site=name, experts=plan.assignment.digest, **facts)
        folders[name] = calibration.root / f"costs-{key}"
    missing = {name: p for name, p in plans.items() if not agreed(present(folders[name]))}
    assignments = {name: plan.assignment for name, plan in missing.items()}
    found = eliminated(calibration, assignments, {name: p.known for name, p in missing.items()})
    for name, costs in found.items():
        get_or_build(
            calibration.root, folders[name].name, lambda f, c=costs: np.save(f / "costs.npy", c)
        )
    return {name: np.load(folder / "costs.npy") for name, folder in folders.items()}


def prefix_experts(
    calibration: Calibration, site: MlpSite, *, unread: bool = False
) -> tuple[int, ...]:
    """Expert of each leading token of a layer; tokens of one kind share it, () where none has one.

    Where the patches are ``unread``, leading tokens have their own in any case.
    """
    kinds = calibration.leading[site.name]
    if calibration.config.tokens != "kinds" and not unread:
        return ()
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
