from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer

from moee_analysis import measure
from moee_analysis.baselines.moefication import MoeficationConfig, convert
from moee_analysis.baselines.static_pruning import prune
from moee_analysis.extraction.pipeline import extract
from moee_analysis.measure.evaluation.mac_table import UnreadMacs, unread_macs
from moee_analysis.models.attention import Factors, Reduction, find_attentions, low_rank
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import moe_layers, replace_module
from tests.helpers.images import toy_images
from tests.helpers.models import (
    SMALL_CONVNEXT,
    lively,
    pixels_of,
    reduced_attention,
    toy_moe,
    toy_swin,
    toy_vit,
)
from tests.helpers.runs import best, quick

IMAGES = toy_images(12)
N, D, H = 17, 32, 64  # tokens, width and hidden neurons of the toy
MLP = 16 * 2 * D * H
ATTENTION = 16 * 2 * D * (D + N)
LAST = ["blocks.2.attn", "blocks.2.mlp"]


def small(kind=VisionTransformer, **settings):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 6}
    model = kind(**sizes | {"depth": 2} | settings)
    model.pretrained_cfg = toy_vit().pretrained_cfg
    return model.eval().requires_grad_(requires_grad=False)


def without_waste(model):
    """A copy whose last block computes nothing for its patches but keys and values."""
    model = copy.deepcopy(model)
    mlp, site = model.blocks[-1].mlp, find_attentions(model)[-1]
    whole = Factors.whole(site)
    reduction = Reduction(whole, whole, torch.zeros(site.heads, site.head_dim), queries=1)
    replace_module(model, site.name, low_rank(site, site.module(model), reduction))

    def of_cls(self, x):
        padded = torch.zeros_like(x)
        padded[:, :1] = type(self).forward(self, x[:, :1])
        return padded

    mlp.forward = partial(of_cls, mlp)
    return model


@pytest.mark.parametrize("build", [toy_vit, lively])
def test_leaving_it_out_saves_exactly_this_and_changes_no_logit(build):
    model = build()
    bare, x = without_waste(model), pixels_of(model)
    torch.testing.assert_close(bare(x), model(x), rtol=1e-4, atol=1e-4)
    saved = count(model).total - count(bare, sites=()).total
    assert sum(each.now for each in unread_macs(model).values()) == saved


def test_the_patches_of_the_last_block_go_unread():
    macs = {"blocks.2.attn": ATTENTION, "blocks.2.mlp": MLP}
    expected = {name: UnreadMacs(("patch",), each, each) for name, each in macs.items()}
    assert unread_macs(toy_vit()) == expected


def one_token(layers, *, kind):
    return {
        f"blocks.1.{name}": UnreadMacs((kind,), macs, macs)
        for name, macs in {"attn": 2 * D * (D + layers), "mlp": 8 * D * D}.items()
    }


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (partial(small, class_token=False, global_pool="avg"), {}),
        (toy_swin, {}),
        (partial(lively, SMALL_CONVNEXT), {}),
        (partial(small, global_pool="avg"), one_token(17, kind="cls")),
        (partial(small, class_token=False, reg_tokens=1, global_pool="avg"),
         one_token(17, kind="register")),
    ],
)  # fmt: skip
def test_where_the_head_reads_all_patches_only_leading_tokens_can_be_left(build, expected):
    assert unread_macs(build()) == expected


def test_registers_go_unread_with_the_patches_and_cls_alone_spends_nothing_on_them():
    found = unread_macs(small(reg_tokens=3))
    assert {each.kinds for each in found.values()} == {("register", "patch")}
    assert found["blocks.1.mlp"].now == 19 * 8 * D * D
    assert unread_macs(small(Cait, depth=1, depth_token_only=1, init_values=1.0)) == {}


def test_attention_that_is_asked_for_cls_alone_wastes_nothing_any_more():
    narrow = unread_macs(reduced_attention(toy_vit(), ranks=(5, 16)))["blocks.2.attn"]
    assert narrow == UnreadMacs(("patch",), ATTENTION, 16 * 2 * (5 + 16) * (D + N))
    asked = unread_macs(reduced_attention(toy_vit(), queries=1))["blocks.2.attn"]
    assert asked == UnreadMacs(("patch",), ATTENTION, 0)


def test_of_tokens_routed_alike_each_costs_the_average():
    model = toy_moe(toy_vit(), layers={2})
    row = measure.macs(model).set_index("component").loc["blocks.2.mlp"]
    assert row["macs_unread"] == pytest.approx(16 * moe_layers(model)[2].macs_per_token())
    assert row["macs_unread_dense"] == MLP
    config = MoeficationConfig(active=0.5, n_experts=16, router="centre")
    row = (
        measure.macs(convert(toy_vit(), IMAGES, config)).set_index("component").loc["blocks.2.mlp"]
    )
    assert row["macs_unread"] == pytest.approx(row["macs"] * 16 / 17)


def test_where_cls_has_an_expert_of_its_own_it_is_told_from_the_patches():
    run = extract(toy_vit(), IMAGES, best(macs_reduction=0.1, unread="routed", metric="outputs"))
    table = measure.macs(run, IMAGES).set_index("component")
    layer = moe_layers(run.model)[2]
    row = table.loc["blocks.2.mlp"]
    assert row["macs_unread"] == pytest.approx(row["macs"] - 2 * D * layer.expert_sizes[0])


@pytest.mark.parametrize("make", [
    lambda: extract(toy_vit(), IMAGES, best(macs_reduction=0.2)),
    lambda: prune(toy_vit(), IMAGES, "output-weighted least squares", macs_reduction=0.2),
], ids=["best", "static pruning"])  # fmt: skip
def test_a_constant_in_the_place_of_unread_outputs_leaves_nothing_to_waste(make):
    run = make()
    table = measure.macs(run).set_index("component")
    assert table.loc["blocks.2.mlp", "macs_unread_dense"] == MLP
    assert table.loc["blocks.2.mlp", "macs_unread"] == pytest.approx(0, abs=1)
    assert table.loc["total", "macs_unread_dense"] == MLP + ATTENTION
    assert table.loc["total", "macs_unread"] == pytest.approx(ATTENTION)


def test_the_table_and_its_caption_tell_it_apart():
    table = measure.macs(toy_vit())
    for column in ("macs_unread", "macs_unread_dense"):
        assert table[column].iloc[:-1].sum() == table[column].iloc[-1] == MLP + ATTENTION
    assert table.attrs["unread_sites"] == LAST
    share = 100 * (MLP + ATTENTION) / count(toy_vit()).total
    told = f"Of these, 0.1 M ({share:.1f} %) go to tokens that nothing reads: the patches of "
    assert told + "blocks.2.attn and blocks.2.mlp." in table.attrs["caption"]
    assert "nothing reads" not in measure.macs(toy_swin()).attrs["caption"]
    run = extract(toy_vit(), IMAGES, quick(macs_reduction=0.2, layers=(1, 2)))
    assert "in the dense model 0.1 M" in measure.macs(run).attrs["caption"]
