"""How many experts and slots each layer has: as published, as given, or within a budget of MACs.

A layer costs its experts, slot by slot, and three products of all tokens with all slots: logits,
dispatch and combine. The paper leaves these out of its FLOPs; here they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from moee_analysis.baselines.common.capacity import fill_budget
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


def size_layers(
    model: nn.Module, sites: Sequence[MlpSite], config: JetpackConfig, *, dense: nn.Module
) -> dict[str, LayerSize]:
    """Size of every layer of ``model``, which still has MLPs there, by its name.

    A budget is a share of the MACs of ``dense``.

    Raises
    ------
    MoeeError
        A budget that cannot be met, or one of a narrower model.
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
