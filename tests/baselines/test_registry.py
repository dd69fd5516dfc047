import inspect
from functools import cache

import pytest
import torch

from moee_analysis.baselines import jetpack, moefication, soft_moe, sparse_upcycling, static_pruning
from moee_analysis.baselines.registry import SYSTEMS, Asked, systems_named
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import pipeline as extraction
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.macs import count
from moee_analysis.moe.expert_layer import counting_usage, macs_as_used
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, pixels_of, same_models, toy_vit

IMAGES = toy_images(24)
CONVERTING = [
    each.convert
    for each in (extraction, jetpack, moefication, soft_moe, sparse_upcycling, static_pruning)
]
ASKED = Asked(0.1, "smoke")  # more than this the slots of so few tokens cannot save


def model_of(made):
    return made.model if isinstance(made, Extraction) else made


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The dense model, and a function that makes a system's model of it, once."""
    dense, store = toy_vit(), tmp_path_factory.mktemp("store")

    @cache
    def make(name):
        return model_of(SYSTEMS[name].make(dense, IMAGES, ASKED, store=store))

    return dense, make


@pytest.mark.parametrize("convert", CONVERTING, ids=lambda convert: convert.__module__)
def test_all_systems_have_one_interface(convert):
    parameters = list(inspect.signature(convert).parameters.values())
    assert [p.name for p in parameters[:3]] == ["dense", "images", "config"]
    assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= {"store"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_makes_the_same_model_again_and_leaves_the_dense_one_alone(name, made):
    (dense, make), x = made, pixels_of(toy_vit())
    model = make(name)
    with torch.no_grad():
        found = model(x)
        again = model_of(SYSTEMS[name].make(toy_vit(), IMAGES, ASKED))(x)
    assert found.shape == dense(x).shape
    assert found.isfinite().all()
    assert torch.equal(found, again)
    assert not model.training
    assert hooks_of(dense) == hooks_of(model) == 0
    assert same_models(dense, toy_vit())


@pytest.mark.parametrize("name", [name for name in SYSTEMS if "top-1" not in name])
def test_the_budget_is_met_on_the_calibration_images(name, made):
    dense, make = made
    model = make(name)
    with torch.no_grad(), counting_usage({name: model}) as usage:
        for batch in IMAGES.batches(dense):
            model(batch)
    saved = 1 - macs_as_used(model, usage[name]) / count(dense).total
    most = 0.25 if "attention" in name else 0.14  # what nothing reads alone is worth more here
    assert 0.06 < saved < most


def test_systems_are_told_and_named():
    assert all(system.told and system.family for system in SYSTEMS.values())
    assert list(systems_named(["Soft MoE: upcycled", "MoEE, paper"])) == [
        "MoEE, paper", "Soft MoE: upcycled",
    ]  # fmt: skip
    with pytest.raises(MoeeError, match="systems among"):
        systems_named(["magic"])
