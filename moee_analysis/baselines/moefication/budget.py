"""How many experts a token uses, for a budget of MACs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from moee_analysis.baselines.moefication.config import MoeficationConfig
from moee_analysis.baselines.moefication.routers import router_macs
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count


@dataclass(frozen=True)
class Dealt:
    """A layer's number of ``experts``, and ``k``, how many of them a token uses."""

    experts: int
    k: int


def chosen_sites(model: nn.Module, config: MoeficationConfig) -> list[MlpSite]:
    """MLPs of ``model`` that are to be converted.

    Raises
    ------
    MoeeError
        Layers that the model does not have, or none.
    """
    sites = find_mlps(model)
    chosen = range(len(sites)) if config.layers is None else config.layers
    unknown = [layer for layer in chosen if layer not in range(len(sites))]
    if unknown or not chosen:
        raise MoeeError(
            f"layers among 0 to {len(sites) - 1}", str(unknown[0] if unknown else "none"),
            "leave out 'layers' to convert all",
        )  # fmt: skip
    return [site for site in sites if site.index in chosen]


def matching_active(dense: nn.Module, config: MoeficationConfig) -> float:
    """Share of the experts of every layer that the budget of ``config`` allows.

    What is left of the MACs when everything but the MLPs and the routers are paid, as a share of
    what the MLPs cost.

    Raises
    ------
    MoeeError
        The MLPs cannot save so much.
    """
    if config.active is not None:
        return config.active
    counted, sites = count(dense), chosen_sites(dense, config)
    fixed = counted.replacing({s.name: router_macs(config, s, config.experts(s)) for s in sites})
    mlps = sum(counted.by_module[site.name] for site in sites)
    active = ((1 - config.macs_reduction) * counted.total - fixed) / mlps
    least = sum(counted.by_module[s.name] / config.experts(s) for s in sites) / mlps
    if not least <= active <= 1:
        reached = [1 - (fixed + share * mlps) / counted.total for share in (1, least)]
        _refuse(config, *reached)
    return active


def dealt(dense: nn.Module, config: MoeficationConfig) -> dict[str, Dealt]:
    """How many experts each layer has and how many of them a token uses, by site name.

    All layers use the same share of their experts, as nearly as whole experts allow. What rounding
    leaves of one layer's MACs the next one gets, so that all together spend no more than the
    budget, and less than one expert of one layer less.
    """
    active, counted = matching_active(dense, config), count(dense)
    found, left = {}, 0.0
    for site in chosen_sites(dense, config):
        experts = config.experts(site)
        each = counted.by_module[site.name] / experts
        left += active * counted.by_module[site.name]
        k = min(max(1, math.floor(left / each + 1e-6)), experts)
        left -= k * each
        found[site.name] = Dealt(experts, k)
    return found


def _refuse(config: MoeficationConfig, least: float, most: float) -> None:
    if most < max(least, 0):
        raise MoeeError(
            "a router that leaves MACs to save",
            f"router='{config.router}', which costs more than the experts save",
            "choose another router, or give the share of active experts in place of macs_reduction",
        )
    raise MoeeError(
        f"a MACs reduction between {max(least, 0):.3f} and {most:.3f} with this router",
        f"{config.macs_reduction} with router='{config.router}'",
        "choose another budget or router",
    )
