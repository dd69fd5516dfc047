from dataclasses import replace

import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import (
    CHOICES,
    CLUSTER_CHOICES,
    RECIPES,
    ClusterConfig,
    ExtractConfig,
    recipe_named,
)
from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import pixels_of, toy_vit
from tests.helpers.runs import CLUSTERING, MEANS, saved_and_loaded

IMAGES = toy_images(8)
SMALL = {"layers": (0, 2), "cluster_tokens": 100, "macs_reduction": 0.05}
CLUSTERED = {"paper": CLUSTERING, "best": MEANS}
SWITCHED = [
    (recipe, piece, choice)
    for recipe in RECIPES
    for piece, choices in CHOICES.items()
    if piece != "budget_in"  # which toys have no time for
    for choice in choices
    if choice != getattr(ExtractConfig(recipe=recipe).resolved(), piece)
]


def small(recipe, **pieces):
    """A recipe for a small model, some of its pieces switched."""
    return ExtractConfig(**{"recipe": recipe, "clustering": CLUSTERED[recipe], **SMALL, **pieces})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What several configurations have in common."""
    return tmp_path_factory.mktemp("store")


def test_the_paper_s_recipe_adds_nothing():
    assert recipe_named("paper") == {
        "clustering": ClusterConfig(), "router": "cosine", "tokens": "alike", "unread": "routed",
        "order": "variance", "metric": "outputs", "budget": "share", "coherence": "ignored",
        "refit": "none", "attention": "dense", "merging": "none",
    }  # fmt: skip


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(MoeeError, match="recipe among paper, best; found 'cake'"):
        recipe_named("cake")


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_decides_every_piece(recipe):
    pieces = CHOICES.keys() - {"noise", "experts", "budget_in"} | {"clustering"}
    assert recipe_named(recipe).keys() == recipe_named(recipe, bound=True).keys() == pieces


@pytest.mark.parametrize(("recipe", "piece", "choice"), SWITCHED)
def test_every_piece_can_be_switched_alone(tmp_path, store, recipe, piece, choice):
    model = toy_vit()
    run = extract(model, IMAGES, small(recipe, **{piece: choice}), store=store)
    assert getattr(run.config, piece) == choice
    assert any(layer.converted for layer in run.layers)
    x = pixels_of(model)
    logits = run.model(x)
    assert logits.shape == model(x).shape
    assert torch.isfinite(logits).all()
    saved_and_loaded(run, tmp_path / "run", dense=model)


@pytest.mark.parametrize("method", CLUSTER_CHOICES["method"])
@pytest.mark.parametrize(("space", "recipe"), [("hidden", "paper"), ("inputs", "best")])
@pytest.mark.parametrize("reduce", [name for name in CLUSTER_CHOICES["reduce"] if name != "umap"])
def test_tokens_can_be_clustered_in_every_way(store, method, space, recipe, reduce):
    settings = {"method": method, "space": space, "reduce": reduce, "count": 5, "max_noise": 1.0}
    clustering = ClusterConfig(**{**vars(CLUSTERING), **settings})
    config = small(recipe, clustering=clustering, layers=(1,))
    run = extract(toy_vit(), IMAGES, config, store=store)
    assert run.layers[1].converted or "clusters found" in run.layers[1].reason
    assert torch.isfinite(run.model(pixels_of(toy_vit()))).all()


@pytest.mark.parametrize(("recipe", "count"), [("paper", 7), ("best", 2)])
def test_as_many_means_as_asked_for_are_as_many_experts_at_most(store, recipe, count):
    clustering = ClusterConfig(**{**vars(MEANS), "count": count})
    run = extract(toy_vit(), IMAGES, small(recipe, clustering=clustering, layers=(0,)), store=store)
    found = moe_layers(run.model)[0].router
    assert 2 <= getattr(found, "inner", found).n_experts <= count


def test_pieces_switched_one_by_one_turn_one_recipe_into_the_other():
    pieces = {**recipe_named("best"), "clustering": MEANS}
    switched = small("paper", **pieces).resolved()
    assert replace(switched, recipe="best") == small("best").resolved()
