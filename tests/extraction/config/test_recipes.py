from __future__ import annotations

import math

import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.clustering import METHODS, REDUCTIONS, SPACES, ClusterConfig
from moee_analysis.extraction.config.extract_config import EXPERTS, NOISE_POLICIES, ExtractConfig
from moee_analysis.extraction.config.recipes import BOUND, CHOICES, RECIPES, recipe_named
from moee_analysis.extraction.experts.refit_w2 import REFITS
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.moe.layer import moe_layers
from tests.helpers.makers import CLUSTERING, MEANS, lively, pixels_of, same_models
from tests.helpers.toys import toy_images, toy_vit

IMAGES = toy_images(8)
SMALL = {"layers": (0, 5), "cluster_tokens": 200, "macs_reduction": 0.05}
CLUSTERED = {"paper": CLUSTERING, "best": MEANS}
PIECES = [(name, choice) for name, choices in CHOICES.items() for choice in choices]
OTHERS = [("noise", choice) for choice in NOISE_POLICIES] + [("experts", e) for e in EXPERTS]


def small(recipe, **pieces):
    """A recipe for a small model, some of its pieces switched."""
    return ExtractConfig(**{"recipe": recipe, "clustering": CLUSTERED[recipe], **SMALL, **pieces})


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """What several configurations have in common."""
    return tmp_path_factory.mktemp("store")


def test_every_recipe_decides_every_piece():
    for pieces in RECIPES.values():
        assert isinstance(pieces["clustering"], ClusterConfig)
        chosen = {name: value for name, value in pieces.items() if name != "clustering"}
        assert chosen.keys() == CHOICES.keys()
        assert all(value in CHOICES[name] for name, value in chosen.items())


def test_what_changes_where_parameters_are_bound_are_pieces_of_the_recipe():
    for name, pieces in BOUND.items():
        assert pieces.keys() <= RECIPES[name].keys()
        assert recipe_named(name, bound=True) == RECIPES[name] | pieces
        assert recipe_named(name) == RECIPES[name]


def test_the_paper_s_recipe_adds_nothing():
    assert recipe_named("paper")["clustering"] == ClusterConfig()
    plain = {
        "router": "cosine", "tokens": "alike", "unread": "routed", "order": "variance",
        "metric": "outputs", "budget": "share", "coherence": "ignored", "union": "at_once",
        "thin": "routed", "refit": "none",
    }  # fmt: skip
    assert recipe_named("paper").items() >= plain.items()


def test_an_unknown_recipe_lists_those_there_are():
    with pytest.raises(MoeeError, match="recipe among paper, best; found 'cake'"):
        recipe_named("cake")


def test_the_refits_are_those_that_are_computed():
    assert CHOICES["refit"] == REFITS


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("piece", "choice"), PIECES + OTHERS)
def test_every_piece_can_be_switched_alone(tmp_path, store, recipe, piece, choice):
    model = lively()
    run = extract(model, IMAGES, small(recipe, **{piece: choice}), store=store)
    assert getattr(run.config, piece) == choice
    assert any(layer.converted for layer in run.layers)
    x = pixels_of(model)
    logits = run.model(x)
    assert logits.shape == model(x).shape
    assert torch.isfinite(logits).all()
    run.save(tmp_path / "run")
    again = load(tmp_path / "run")
    assert again.config == run.config
    assert again.layers == run.layers
    assert same_models(again.model, run.model)
    assert torch.equal(again.model(x), logits)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("reduce", [name for name in REDUCTIONS if name != "umap"])
def test_tokens_can_be_clustered_in_every_way(store, method, space, reduce):
    settings = {"method": method, "space": space, "reduce": reduce, "count": 5, "max_noise": 1.0}
    clustering = ClusterConfig(**{**vars(CLUSTERING), **settings})
    for recipe in RECIPES:
        config = small(recipe, clustering=clustering, layers=(1,))
        run = extract(toy_vit(), IMAGES, config, store=store)
        assert run.layers[1].converted or "clusters found" in run.layers[1].reason
        assert torch.isfinite(run.model(pixels_of(toy_vit()))).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_as_many_means_as_asked_for_are_as_many_experts_at_most(store, recipe):
    for count in (2, 7):
        clustering = ClusterConfig(**{**vars(MEANS), "count": count})
        config = small(recipe, clustering=clustering, thin="routed")
        run = extract(lively(), IMAGES, config, store=store)
        found = moe_layers(run.model)[0].router
        assert 2 <= getattr(found, "inner", found).n_experts <= count


def test_pieces_switched_one_by_one_turn_one_recipe_into_the_other():
    pieces = {**RECIPES["best"], "clustering": MEANS}
    model, x = lively(), pixels_of(lively())
    one = extract(model, IMAGES, small("paper", **pieces))
    other = extract(model, IMAGES, small("best"))
    assert torch.equal(one.model(x), other.model(x))
    assert math.isclose(one.layers[0].active_fraction, other.layers[0].active_fraction)
