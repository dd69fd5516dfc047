"""The recipes: each piece of an extraction, unless a configuration says otherwise.

Every piece can be switched on or off alone, in any recipe.
"""

from dataclasses import dataclass, field, replace
from typing import Any

from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.utils.checks import one_of


@dataclass(frozen=True)
class Recipe:
    """Settings of ``ExtractConfig`` by name, and those that change where parameters are bound."""

    pieces: dict[str, Any]
    bound: dict[str, Any] = field(default_factory=dict)


_MEANS = ClusterConfig(
    method="kmeans", space="inputs", reduce="pca", components=None, count=None
)  # as many as suit the width of a layer

RECIPES: dict[str, Recipe] = {
    "paper": Recipe(  # MoEE as published, nothing added
        {
            "clustering": ClusterConfig(), "router": "cosine", "tokens": "alike",
            "unread": "routed", "order": "variance", "metric": "outputs", "budget": "share",
            "coherence": "ignored", "refit": "none", "attention": "dense",
        }
    ),
    "best": Recipe(  # the best that this project has found
        {
            "clustering": _MEANS, "router": "nearest", "tokens": "kinds",
            "unread": "constant", "order": "weighted", "metric": "fisher", "budget": "global",
            "coherence": "measured", "refit": "shared", "attention": "dense",
        },
        # Every expert more has a router and a shift to store; and of neurons that go from all
        # experts at once, the refit can make good the more.
        bound={"clustering": replace(_MEANS, count=16), "order": "obs"},
    ),
}  # fmt: skip


def recipe_named(name: str, *, bound: bool = False) -> dict[str, Any]:
    """Return the pieces of the recipe called ``name``, with ``bound`` parameters or without."""
    one_of("recipe", name, RECIPES)
    recipe = RECIPES[name]
    return recipe.pieces | (recipe.bound if bound else {})
