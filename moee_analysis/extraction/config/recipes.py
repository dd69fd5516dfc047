"""The recipes: what each of the pieces of an extraction is, unless a configuration says otherwise.

``paper`` is MoEE as published, nothing added. ``best`` is whatever this project has found to be
best; where the parameters are bound as well, some of its pieces change. Every piece can be switched
on or off alone, in either recipe.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.utils.checks import one_of

CHOICES: dict[str, tuple[str, ...]] = {
    "router": ("cosine", "nearest"),
    "tokens": ("alike", "kinds"),
    "unread": ("routed", "constant"),
    "order": ("magnitude", "variance", "weighted", "obs"),
    "metric": ("outputs", "fisher"),
    "budget": ("share", "global"),
    "coherence": ("ignored", "measured"),
    "union": ("at_once", "steps"),
    "thin": ("routed", "dense"),
    "refit": ("none", "shift", "shared", "each"),
    "attention": ("dense", "read", "low_rank"),
}
"""The pieces that are chosen by name, and their names; explained in ``ExtractConfig``."""

TOKEN_KINDS = ("cls", "dist", "register", "patch")
"""Kinds of tokens that can be kept dense, as ``token_kinds`` tells them."""

_MEANS = ClusterConfig(
    method="kmeans", space="inputs", reduce="pca", components=None, count=None
)  # as many as suit the width of a layer

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
        "union": "at_once",
        "thin": "routed",
        "refit": "none",
        "attention": "dense",
    },
    "best": {
        "clustering": _MEANS,
        "router": "nearest",
        "tokens": "kinds",
        "unread": "constant",
        "order": "weighted",
        "metric": "fisher",
        "budget": "global",
        "coherence": "measured",
        "union": "at_once",
        "thin": "dense",
        "refit": "shared",
        "attention": "dense",
    },
}

BOUND: dict[str, dict[str, Any]] = {
    "best": {"clustering": replace(_MEANS, count=16), "order": "obs", "union": "steps"},
}
"""What changes where the stored parameters are bound: every expert more has a router and a shift to
store; and of neurons that go from all experts at once, the refit can make good the more."""


def recipe_named(name: str, *, bound: bool = False) -> dict[str, Any]:
    """Return the pieces of the recipe called ``name``, with ``bound`` parameters or without.

    Raises
    ------
    MoeeError
        No such recipe; it lists the names there are.
    """
    one_of("recipe", name, RECIPES)
    return RECIPES[name] | (BOUND.get(name, {}) if bound else {})
