import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.common.exchange import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import replace_module
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, seen_by, toy_vit

IMAGES = toy_images(4)


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


@torch.no_grad()
def slow_contributions(model, name):
    """Per group: mean length, over that of the whole, and mass, token by token and slot by slot."""
    layer = model.get_submodule(name)
    ((tokens, outputs),) = seen_by(layer, model, IMAGES)
    mixing, found = layer.router(tokens), np.zeros((2, 2))
    made = layer.slot_outputs(tokens, mixing)
    for image, token in np.ndindex(*tokens.shape[:2]):
        for group, experts in enumerate(([0, 1, 2], [3, 4])):
            weights = {
                (e, s): mixing.combine[image, token, 2 * e + s] for e in experts for s in (0, 1)
            }
            part = sum(weight * made[image, e, s] for (e, s), weight in weights.items())
            found[group] += part.norm(), sum(weights.values())
    lengths, mass = found.T / (tokens.shape[0] * tokens.shape[1])
    return lengths, lengths / outputs.norm(dim=2).mean().item(), mass


def test_equals_sums_slot_by_slot(model):
    table = measure.contributions(model, IMAGES)
    assert table[["layer", "group", "experts"]].values.tolist() == [
        [1, "core", 3], [1, "universal", 2], [2, "core", 3], [2, "universal", 2]
    ]  # fmt: skip
    assert list(table.columns[3:]) == ["hidden", "contribution", "relative", "mass"]
    for layer in (1, 2):
        own = table[table["layer"] == layer]
        expected = slow_contributions(model, f"blocks.{layer}.mlp")
        for column, values in zip(("contribution", "relative", "mass"), expected, strict=True):
            assert own[column].to_numpy() == pytest.approx(values, rel=1e-4)
        assert own["mass"].sum() == pytest.approx(1)
    assert hooks_of(model) == 0
