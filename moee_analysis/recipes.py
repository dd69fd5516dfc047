"""The recipes: what each of the pieces of an extraction is, unless a configuration says otherwise.

``paper`` is MoEE as published, nothing added. ``best`` is whatever this project has found to be
best. Every piece can be switched on or off alone, in either recipe.
"""

from __future__ import annotations

from typing import Any

from moee_analysis.clustering import ClusterConfig
from moee_analysis.errors import MoeeError

CHOICES: dict[str, tuple[str, ...]] = {
    "router": ("cosine", "nearest"),
    "tokens": ("alike", "kinds"),
    "unread": ("routed", "constant"),
    "order": ("magnitude", "variance", "weighted", "obs"),
    "metric": ("outputs", "fisher"),
    "budget": ("share", "global"),
    "coherence": ("ignored", "measured"),
    "refit": ("none", "shift", "shared", "each"),
}
"""The pieces that are chosen by name, and their names; explained in ``ExtractConfig``."""

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "clustering": ClusterConfig(),
        "router": "cosine",
        "tokens": "alike",
        "unread": "routed",
        "order": "variance",
        "metric": "outputs",
        "budget": "share",
        "coherence": "ignored",
        "refit": "none",
    },
    "best": {
        "clustering": ClusterConfig(method="kmeans", space="inputs", reduce="none", count=32),
        "router": "nearest",
        "tokens": "kinds",
        "unread": "constant",
        "order": "obs",
        "metric": "fisher",
        "budget": "global",
        "coherence": "measured",
        "refit": "shared",
    },
}


def recipe_named(name: str) -> dict[str, Any]:
    """Return the pieces of the recipe called ``name``; a MoeeError lists the names there are."""
    if name not in RECIPES:
        raise MoeeError(f"recipe among {', '.join(RECIPES)}", f"'{name}'", "name one")
    return RECIPES[name]
