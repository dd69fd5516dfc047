"""The ways to start that MoE Jetpack is compared with, each under the name it has in the study.

The predecessor is a trained dense model; all successors have the same smaller width, and layers
with experts cost about the MACs of their MLPs, mixing included, unless the number of experts is
varied. Source: Zhu et al., "MoE Jetpack", NeurIPS 2024, tables 1 to 5.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import nn

from moee_analysis.baselines import jetpack, soft_moe, sparse_upcycling
from moee_analysis.baselines.common.exchange import Store
from moee_analysis.baselines.jetpack import JetpackConfig
from moee_analysis.baselines.jetpack.convert import LayerSize
from moee_analysis.data.images import ImageSet
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.macs import count

Starts = Mapping[str, Callable[[int], nn.Module]]
"""From a seed to a model that is to be trained, by name."""

SCRATCH, PRETRAINED = "dense, scratch", "dense, pretrained"
SOFT, UPCYCLED, RECYCLED = "Soft MoE, scratch", "Sparse Upcycling", "recycled, plain router"
JETPACK = "MoE Jetpack"
COPIES = "copies of one MLP"
CORE_SHARES = (0.0, 1 / 3, 2 / 3, 1.0)


@dataclass(frozen=True)
class JetpackStudy:
    """Successors of one trained ``dense`` model.

    Activations of the calibration ``images`` say what is recycled. Their ``width`` is half of its
    own, unless another is given.
    """

    dense: nn.Module
    images: ImageSet
    width: int | None = None
    store: Store = None

    def components(self) -> Starts:
        """From the dense model to Jetpack, with what lies between and beside them."""
        return {
            SCRATCH: self.scratch,
            PRETRAINED: self.pretrained,
            SOFT: self._soft,
            UPCYCLED: self._upcycled,
            RECYCLED: self.jetpack(router="soft"),
            JETPACK: self.jetpack(),
        }

    def methods(self) -> Starts:
        """Ways to recycle weights, all with Jetpack's router; plain copies first."""
        others = {name: self.jetpack(method=name) for name in ("random", "uniform", "graph")}
        return {COPIES: self._copies, **others, "importance": self.jetpack()}

    def core_shares(self) -> Starts:
        """Core experts alone, universal ones alone, and between, at about the same MACs."""
        named = {f"core {share:.0%}": self._numbers(share) for share in CORE_SHARES}
        return {name: self.jetpack(core=c, universal=u) for name, (c, u) in named.items()}

    def sizes(self) -> Starts:
        """Fewer and more layers with experts, and half and twice as many experts in each."""
        (core, universal), third = self._numbers(1 / 3), max(1, len(self.layers) // 3)
        earlier = tuple(n for n in self._alike if n < self.layers[0])[-third:]
        layers = (self.layers[third:], earlier + self.layers)
        numbers = ((max(1, core // 2), universal // 2), (2 * core, 2 * universal))
        by_layers = {f"{len(own)} layers": self.jetpack(layers=own) for own in layers}
        by_numbers = {f"{c} + {u} experts": self.jetpack(core=c, universal=u) for c, u in numbers}
        return by_layers | by_numbers

    def jetpack(self, **settings: Any) -> Callable[[int], nn.Module]:
        """MoE Jetpack with other ``settings`` than those of the study."""
        config = self.jetpack_config(**settings)
        return lambda seed: jetpack.convert(
            self.dense, self.images, replace(config, seed=seed), store=self.store
        )

    def jetpack_config(self, **settings: Any) -> JetpackConfig:
        """Configuration of the study's successors, one third of their experts core."""
        core, universal = self._numbers(1 / 3)
        own = {"layers": self.layers, "core": core, "universal": universal}
        return replace(self.recipe, **(own | settings))

    def scratch(self, seed: int) -> nn.Module:
        """The successor's architecture with random weights."""
        return jetpack.successor(self.dense, self.recipe.width, seed=seed)

    def pretrained(self, seed: int) -> nn.Module:
        """The predecessor, narrowed."""
        config = replace(self.recipe, seed=seed)
        return jetpack.narrowed(self.dense, self.images, config, store=self.store)

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """MLPs that get experts: those of the second half with as many tokens as the first."""
        return tuple(n for n in self._alike if n >= len(find_mlps(self.dense)) // 2)

    @cached_property
    def _alike(self) -> list[int]:
        """MLPs with as many tokens as the first one of the second half."""
        sites, tokens = find_mlps(self.dense), count(self.dense).tokens
        wanted = tokens[sites[len(sites) // 2].name]
        return [site.index for site in sites if tokens[site.name] == wanted]

    @cached_property
    def recipe(self) -> JetpackConfig:
        """What all conversions by Jetpack have in common."""
        return JetpackConfig(width=self.width or self.dense.num_features // 2)

    @cached_property
    def _first(self) -> tuple[MlpSite, int]:
        """The successor's first MLP of those that get experts, and its tokens."""
        site = find_mlps(self.scratch(0))[self.layers[0]]
        return site, count(self.dense).tokens[site.name]

    def _numbers(self, core_share: float) -> tuple[int, int]:
        """Core and universal experts that cost the MACs of the MLP, mixing included."""
        (site, tokens), ratio = self._first, self.recipe.universal_ratio
        core, universal = (LayerSize(*n).macs(site, tokens, ratio) for n in ((1, 0), (0, 1)))
        each = core_share * core + (1 - core_share) * universal
        total = round(2 * tokens * site.dim * site.hidden / each)
        return round(core_share * total), total - round(core_share * total)

    def _soft(self, seed: int) -> nn.Module:
        config = soft_moe.SoftMoeConfig(
            experts=self._numbers(1.0)[0], slots=1, initialisation="fresh", drop=self.recipe.drop,
            layers=self.layers, seed=seed,
        )  # fmt: skip
        return soft_moe.convert(self.scratch(seed), self.images, config)

    def _upcycled(self, seed: int) -> nn.Module:
        settings = {"experts": 8, "capacity": 1.0, "layers": self.layers, "seed": seed}
        config = sparse_upcycling.SparseUpcyclingConfig(**settings)
        return sparse_upcycling.convert(self.pretrained(seed), self.images, config)

    def _copies(self, seed: int) -> nn.Module:
        own = {"layers": self.layers, "core": self._numbers(1.0)[0], "universal": 0}
        config = replace(self.recipe, method="uniform", seed=seed, **own)
        return jetpack.convert(self.pretrained(seed), self.images, config)
