import copy

import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines import moefication, soft_moe, sparse_upcycling
from moee_analysis.baselines.controls import constantly_routed, oracle_routed, randomly_routed
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import counting_usage, expert_layers, macs_as_used, moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, pixels_of, toy_kinds, toy_moe, toy_vit

IMAGES = toy_images(24)
MOEFIED = moefication.MoeficationConfig(active=0.5, n_experts=8, router="centre")
CHOICE = sparse_upcycling.SparseUpcyclingConfig(experts=4, capacity=0.5)
SOFT = soft_moe.SoftMoeConfig(experts=4)
OF_PARTS, OF_THEIR_OWN = ["MoEE", "kinds", "MoEfication"], ["Expert Choice", "Soft MoE"]


@pytest.fixture(scope="module")
def models():
    return {
        "MoEE": toy_moe(toy_vit()),
        "kinds": toy_kinds(toy_vit()),
        "MoEfication": moefication.convert(toy_vit(), IMAGES, MOEFIED),
        "Expert Choice": sparse_upcycling.convert(toy_vit(), IMAGES, CHOICE),
        "Soft MoE": soft_moe.convert(toy_vit(), IMAGES, SOFT),
    }


def test_all_kinds_of_layers_are_found_and_dense_ones_are_not(models):
    found = {name: list(expert_layers(model)) for name, model in models.items()}
    every = [f"blocks.{index}.mlp" for index in range(3)]
    assert found["MoEE"] == found["kinds"] == found["MoEfication"] == every
    assert found["Expert Choice"] == ["blocks.1.mlp"]
    assert found["Soft MoE"] == every[1:] or found["Soft MoE"] == every[2:]
    assert not expert_layers(toy_vit())


def test_usage_counts_the_choices_of_all_tokens(models):
    batches = list(IMAGES.batches(models["MoEE"]))
    with torch.no_grad(), counting_usage(models) as usage:
        for model in models.values():
            for x in batches:
                model(x)
    tokens = len(IMAGES) * 17
    assert {u.sum().item() for u in usage["MoEE"].values()} == {tokens}
    assert {u.sum().item() for u in usage["MoEfication"].values()} == {4 * tokens}
    for used in usage["Soft MoE"].values():
        assert used.sum().item() == pytest.approx(tokens, rel=1e-5)
    assert all(hooks_of(model) == 0 for model in models.values())
    routes = measure.routes(models["MoEE"], IMAGES)
    for index, used in enumerate(usage["MoEE"].values()):
        assert used.tolist() == routes.counts[index].sum(0).tolist()
    for name in OF_PARTS:
        expected = measure.macs(models[name], IMAGES).set_index("component").loc["total", "macs"]
        assert macs_as_used(models[name], usage[name]) == pytest.approx(expected)
    for name in OF_THEIR_OWN:
        assert macs_as_used(models[name], {}) == count(models[name], sites=[]).total


@pytest.mark.parametrize("name", [*OF_PARTS, *OF_THEIR_OWN])
def test_controls_keep_the_experts_and_change_what_is_computed(models, name):
    model, x = models[name], pixels_of(toy_vit())
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        own, random, constant = (
            each(x) for each in (model, randomly_routed(model), constantly_routed(model))
        )
        assert torch.equal(randomly_routed(model)(x), random)
    assert not torch.allclose(own, random)
    assert not torch.allclose(own, constant)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_controls_have_as_many_experts_a_token_and_leave_leading_tokens_their_own(models):
    layer = moe_layers(randomly_routed(models["MoEfication"]))[1]
    chosen = layer.router(torch.randn(4000, 32))
    assert chosen.shape == (4000, 4)
    assert all(len(set(row)) == 4 for row in chosen.tolist())
    often = chosen.flatten().bincount(minlength=8) / 4000
    assert torch.corrcoef(torch.stack([often, layer.shares]))[0, 1] > 0.9
    for layer in moe_layers(constantly_routed(models["MoEfication"])).values():
        chosen = layer.router(torch.randn(50, 32))
        assert (chosen == chosen[0]).all()
        assert set(chosen[0].tolist()) == set(layer.shares.topk(4).indices.tolist())
    for layer in moe_layers(constantly_routed(models["kinds"])).values():
        chosen = layer.router(torch.randn(2, 17, 32)).reshape(2, 17)
        assert (chosen[:, 0] == 0).all()
        assert (chosen[:, 1:] == 1 + layer.shares[1:].argmax()).all()


def test_the_oracle_is_nearest_to_the_dense_layers_output_and_leaves_other_layers_alone(models):
    dense, model = toy_vit(depth=1), toy_moe(toy_vit(depth=1))
    x = torch.randn(40, 32)
    own, oracle = (moe_layers(m)[0] for m in (model, oracle_routed(model, dense)))
    wanted = dense.blocks[0].mlp(x)
    errors = [(layer(x) - wanted).square().sum(1) for layer in (own, oracle)]
    assert (errors[1] <= errors[0] + 1e-5).all()
    assert errors[1].sum() < errors[0].sum()
    x = pixels_of(toy_vit())
    for name in ("MoEfication", "Soft MoE"):
        torch.testing.assert_close(oracle_routed(models[name], toy_vit())(x), models[name](x))
