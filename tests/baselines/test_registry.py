import inspect

import pytest
import torch

from moee_analysis.baselines import (
    jetpack,
    moefication,
    soft_moe,
    sparse_upcycling,
    static_pruning,
    token_merging,
)
from moee_analysis.baselines.registry import SYSTEMS, Asked, systems_named
from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import counting_usage, macs_as_used
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, same_models, toy_vit

IMAGES = toy_images(24)
ASKED = Asked(0.1, "smoke")  # more than this the slots of so few tokens cannot save


def test_all_systems_have_one_interface():
    rivals = (jetpack, moefication, soft_moe, sparse_upcycling, static_pruning, token_merging)
    for room in rivals:
        parameters = list(inspect.signature(room.convert).parameters.values())
        assert [p.name for p in parameters[:3]] == ["dense", "images", "config"], room
        assert {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} >= {"store"}


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system_makes_the_same_model_again_within_its_budget(name, tmp_path):
    dense = toy_vit()
    made = SYSTEMS[name].make(dense, IMAGES, ASKED, store=tmp_path)
    again = SYSTEMS[name].make(toy_vit(), IMAGES, ASKED)
    model, again = (getattr(each, "model", each) for each in (made, again))
    assert hooks_of(dense) == hooks_of(model) == 0
    assert same_models(dense, toy_vit())
    assert not model.training
    batch = next(IMAGES.batches(dense, batch_size=len(IMAGES)))
    with torch.no_grad(), counting_usage({name: model}) as usage:
        found = model(batch)
    assert found.shape == dense(batch).shape
    assert found.isfinite().all()
    assert torch.equal(found, again(batch))
    if "top-1" not in name:
        saved = 1 - macs_as_used(model, usage[name]) / count(dense).total
        most = (
            0.25 if {"attention too", "all three"} & {*name.split(", ")} else 0.14
        )  # nothing reads much of so small a model
        assert 0.06 < saved < most


def test_systems_are_told_and_named():
    assert all(system.told and system.family for system in SYSTEMS.values())
    assert list(systems_named(["Soft MoE: upcycled", "MoEE, paper"])) == [
        "MoEE, paper", "Soft MoE: upcycled",
    ]  # fmt: skip
    with pytest.raises(MoeeError, match="systems among"):
        systems_named(["magic"])
