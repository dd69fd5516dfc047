from contextlib import nullcontext

import pytest
import timm
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import watch
from moee_analysis.models.macs import count, count_parameters, moe_macs
from moee_analysis.moe.layer import moe_layers, moe_names
from tests.helpers.families import small
from tests.helpers.models import hooks_of, toy_moe, toy_swin, toy_vit


def closed_form(*, dim, hidden, depth, patches, pixels, classes):
    tokens = patches + 1
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * hidden
    return patches * pixels * dim + depth * block + classes * dim


def swin_closed_form(*, dim, depths, window, side, classes):
    """Patches of 4 x 4; windows of attention; merging 2 x 2 tokens; widths double."""
    macs = side**2 * 48 * dim
    for stage, depth in enumerate(depths):
        if stage:
            side, dim = side // 2, 2 * dim
            macs += side**2 * (2 * dim) * dim  # of four tokens of half the width
        tokens = side**2
        block = 4 * tokens * dim**2 + 2 * tokens * window**2 * dim + 2 * tokens * dim * 4 * dim
        macs += depth * block
    return macs + dim * classes


def convnext_closed_form(*, dims, depths, side, classes):
    """A stem of 4 x 4; depthwise convolutions of 7 x 7; downsampling of 2 x 2."""
    macs = side**2 * 48 * dims[0]
    for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        if stage:
            side //= 2
            macs += side**2 * 4 * dims[stage - 1] * dim
        macs += depth * side**2 * (49 * dim + 2 * dim * 4 * dim)
    return macs + dims[-1] * classes


DEIT = {"depth": 12, "patches": 196, "pixels": 768, "classes": 1000}


SWIN = {"dim": 96, "depths": (2, 2, 6, 2), "window": 7, "side": 56, "classes": 1000}
CONVNEXT = {"dims": (96, 192, 384, 768), "depths": (3, 3, 9, 3), "side": 56, "classes": 1000}


@pytest.mark.parametrize(("name", "expected", "published"), [
    ("deit_tiny_patch16_224", closed_form(dim=192, hidden=768, **DEIT), 1.254e9),
    ("deit_small_patch16_224", closed_form(dim=384, hidden=1536, **DEIT), 4.599e9),
    ("swin_tiny_patch4_window7_224", swin_closed_form(**SWIN), 4.5e9),
    ("convnext_tiny", convnext_closed_form(**CONVNEXT), 4.5e9),
])  # fmt: skip
def test_networks_cost_what_is_published(name, expected, published):
    model = timm.create_model(name, pretrained=False)
    total = count(model).total
    assert total == expected
    assert total == pytest.approx(published, rel=1e-3 if "deit" in name else 1e-2)
    assert name != "deit_tiny_patch16_224" or count_parameters(model) == 5_717_416


def test_every_part_of_a_vit_is_counted():
    counted = count(toy_vit())
    assert counted.tokens == {f"blocks.{i}.mlp": 17 for i in range(3)}
    assert counted.by_module["blocks.1.mlp"] == 17 * 2 * 32 * 64
    assert counted.by_module["blocks.1.attn"] == 17 * 4 * 32**2 + 2 * 17**2 * 32
    assert counted.total == closed_form(
        dim=32, hidden=64, depth=3, patches=16, pixels=192, classes=6
    )


def test_feature_maps_are_tokens():
    counted = count(toy_swin())
    assert counted.tokens == {"layers.0.blocks.0.mlp": 64, "layers.1.blocks.0.mlp": 16}
    mlps = [counted.by_module[name] for name in counted.tokens]
    assert mlps == [64 * 2 * 16 * 32, 16 * 2 * 32 * 64]
    assert counted.total > sum(mlps)


def test_sites_are_replaced_by_their_costs_and_unknown_ones_refused():
    counted = count(toy_vit())
    same = counted.replacing({"blocks.0.mlp": 2 * 32 * 64, "blocks.2.mlp": 2 * 32 * 64})
    assert same == counted.total
    assert counted.replacing({"blocks.0.mlp": 0}) == counted.total - 17 * 2 * 32 * 64
    with pytest.raises(MoeeError, match=r"blocks\.9"):
        counted.replacing({"blocks.9.mlp": 1})


@pytest.mark.parametrize("make", [toy_vit, toy_swin])
def test_routed_layers_cost_their_expected_experts(make):
    dense = count(make())
    moe = toy_moe(make())
    costs = {name: moe_layers(moe)[i].macs_per_token() for i, name in moe_names(moe).items()}
    assert moe_macs(moe, costs) == pytest.approx(dense.replacing(costs))
    assert moe_macs(moe, costs) < dense.total


def test_layers_of_known_cost_do_not_run_while_the_rest_is_counted():
    moe = toy_moe(toy_vit())
    wrapped, plain = moe.blocks[0].mlp, type(moe.blocks[0].mlp).forward
    wrapped.forward = lambda x: 2 * plain(wrapped, x)
    x, names = torch.rand(2, 3, 32, 32), list(moe_names(moe).values())
    before, costs = moe(x), dict.fromkeys([*names, "blocks.0.mlp"], 5.0)
    assert moe_macs(moe, costs) == count(moe, sites=costs).replacing(costs)
    assert torch.equal(moe(x), before)
    with pytest.raises(ZeroDivisionError), watch({0: moe.head}, lambda *_: 1 / 0):
        moe_macs(moe, costs)
    assert torch.equal(moe(x), before)


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_is_left_as_it_was_also_after_an_error(breaks):
    model = toy_vit().train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    if breaks:
        model.head = nn.Linear(1, 1)
        before["head"] = True
    with pytest.raises(RuntimeError) if breaks else nullcontext():
        count(model)
    assert {name: module.training for name, module in model.named_modules()} == before
    assert all(block.attn.fused_attn for block in model.blocks)
    assert not hooks_of(model)


def test_parameters_that_are_handed_to_modules_may_ask_for_gradients():
    model = small("small_siglip").requires_grad_()
    model.blocks[0].requires_grad_(requires_grad=False)
    asked = [parameter.requires_grad for parameter in model.parameters()]
    total = count(model).total
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert total == count(model.requires_grad_(requires_grad=False)).total
    model.head = nn.Linear(1, 1)
    with pytest.raises(RuntimeError):
        count(model.requires_grad_())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_shared_neurons_and_tied_weights_count_once_and_indices_are_free():
    layer = moe_layers(toy_moe(toy_vit(depth=1)))[0]
    union = len(layer.kept)
    assert sum(layer.expert_sizes) > union
    assert count_parameters(layer) == union * 32 + union + 32 * union + 32 + 4 * 32
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert count_parameters(tied) == 9 + 3 + 3
