"""How many experts and slots each layer has: as published, as told, or as a budget of MACs allows.

A layer costs its experts, slot by slot, and three products of all tokens with all slots: logits,
dispatch and combine. The paper leaves these out of its FLOPs; here they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn

from moee_analysis.baselines.common.capacity import ExpertCost, saving
from moee_analysis.baselines.jetpack.config import JetpackConfig
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite
from moee_analysis.models.macs import MacCount, count

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


def sizes_of(
    model: nn.Module, sites: Sequence[MlpSite], config: JetpackConfig, *, dense: nn.Module
) -> dict[str, LayerSize]:
    """Size of every layer of ``model`` that gets experts, by its name.

    Parameters
    ----------
    model
        The model to get experts, still with MLPs.
    dense
        The model whose MACs the budget is a share of.

    Raises
    ------
    MoeeError
        A budget that cannot be met, or one of a narrower model.
    """
    if config.macs_reduction is None and config.core is not None:
        told = LayerSize(config.core, config.universal, config.slots)
        return {site.name: told for site in sites}
    counted = count(model)
    if config.macs_reduction is None:
        return {site.name: _published(_patches(model, counted, site), config) for site in sites}
    if model.num_features != dense.num_features:
        raise MoeeError(
            "a MACs reduction at the dense model's width",
            f"macs_reduction={config.macs_reduction} at width {model.num_features}",
            "leave the width as it is, or choose core, universal and slots",
        )
    return _within_budget(counted, sites, config, total=count(dense).total)


def _published(patches: int, config: JetpackConfig) -> LayerSize:
    core = max(1, patches // 2)
    return LayerSize(core, UNIVERSAL_PER_CORE * core, config.slots)


def _patches(model: nn.Module, counted: MacCount, site: MlpSite) -> int:
    return counted.tokens[site.name] - getattr(model, "num_prefix_tokens", 0)


def _within_budget(
    counted: MacCount, sites: Sequence[MlpSite], config: JetpackConfig, *, total: int
) -> dict[str, LayerSize]:
    """Slots of every expert, or experts of one slot, as many as a budget allows."""
    step, ratio = _step(config), config.universal_ratio
    tokens = [counted.tokens[site.name] for site in sites]
    costs = [
        ExpertCost(step.macs(site, each, ratio), each)
        for site, each in zip(sites, tokens, strict=True)
    ]
    outside = counted.replacing({site.name: 0 for site in sites})
    counts = saving(config.macs_reduction, costs, dense=total, fixed=outside)
    return {
        site.name: _stepped(step, config, count=steps)
        for site, steps in zip(sites, counts, strict=True)
    }


def _step(config: JetpackConfig) -> LayerSize:
    """The least that a layer can have: a slot of every expert, or a core expert and its others."""
    if config.core is None:
        return LayerSize(1, UNIVERSAL_PER_CORE)
    return LayerSize(config.core, config.universal)


def _stepped(step: LayerSize, config: JetpackConfig, *, count: int) -> LayerSize:
    if config.core is None:
        return LayerSize(count * step.core, count * step.universal)
    return replace(step, slots=count)
