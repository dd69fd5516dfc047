from __future__ import annotations

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.common.expert_mlps import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import replace_module
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit

IMAGES = toy_images(10)


@pytest.fixture
def model():
    """A ViT whose last two MLPs are three and two experts on two slots each."""
    made = toy_vit()
    for site in find_mlps(made)[1:]:
        mlps = [find_mlps(toy_vit(seed=s))[site.index].module(toy_vit(seed=s)) for s in range(5)]
        groups = [ExpertMlps(mlps[:3], mlps[0].act), ExpertMlps(mlps[3:], mlps[0].act)]
        layer = SlotMlp(SoftRouter(site.dim, 5, slots=2, seed=site.index), groups, slots=2)
        replace_module(made, site.name, layer.eval())
    return made


def _slowly(model, name):
    """Per group: mean length, over that of the whole, and mass, token by token and slot by slot."""
    layer, seen = model.get_submodule(name), []
    hook = layer.register_forward_hook(lambda _m, args, output: seen.append((args[0], output)))
    with torch.no_grad():
        for x in IMAGES.batches(model):
            model(x)
    hook.remove()
    found = np.zeros((2, 3))
    for tokens, outputs in seen:
        with torch.no_grad():
            mixing = layer.router(tokens)
            made = layer.slot_outputs(tokens, mixing)
        for image, token in np.ndindex(*tokens.shape[:2]):
            for group, experts in enumerate(([0, 1, 2], [3, 4])):
                part = torch.zeros(tokens.shape[2])
                for expert in experts:
                    for slot in range(2):
                        weight = mixing.combine[image, token, 2 * expert + slot]
                        part += weight * made[image, expert, slot]
                        found[group, 2] += weight
                found[group, 0] += part.norm()
        found[:, 1] += outputs.norm(dim=2).sum().item()
    count = sum(tokens.shape[0] * tokens.shape[1] for tokens, _ in seen)
    lengths, whole, mass = found.T / count
    return lengths, lengths / whole, mass


def test_equals_sums_slot_by_slot(model):
    table = measure.contributions(model, IMAGES)
    assert list(table.columns) == [
        "layer", "group", "experts", "hidden", "contribution", "relative", "mass"
    ]  # fmt: skip
    assert table["layer"].tolist() == [1, 1, 2, 2]
    assert table["group"].tolist() == ["core", "universal"] * 2
    assert table["experts"].tolist() == [3, 2, 3, 2]
    for layer in (1, 2):
        own = table[table["layer"] == layer]
        expected = _slowly(model, f"blocks.{layer}.mlp")
        for column, values in zip(("contribution", "relative", "mass"), expected, strict=True):
            assert own[column].to_numpy() == pytest.approx(values, rel=1e-4)
        assert own["mass"].sum() == pytest.approx(1)
    assert hooks_of(model) == 0


def test_a_group_that_makes_nothing_adds_nothing(model):
    with torch.no_grad():
        for name in ("fc2_weight", "fc2_bias"):
            getattr(model.blocks[1].mlp.groups[1], name).zero_()
    table = measure.contributions(model, IMAGES, groups=("a", "b")).set_index(["layer", "group"])
    assert table.loc[(1, "b"), "contribution"] == 0
    assert table.loc[(1, "a"), "relative"] == pytest.approx(1)
    assert table.loc[(1, "b"), "mass"] > 0.1


def test_models_without_slots_or_groups_without_names_are_refused(model):
    with pytest.raises(MoeeError, match="slots"):
        measure.contributions(toy_vit(), IMAGES)
    with pytest.raises(MoeeError, match="names of 2 groups"):
        measure.contributions(model, IMAGES, groups=("one",))
