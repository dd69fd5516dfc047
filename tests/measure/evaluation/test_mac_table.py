import copy
from functools import partial

import numpy as np
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
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers, replace_module, set_dispatch
from tests.helpers.images import toy_images
from tests.helpers.models import (
    SMALL_CONVNEXT,
    lively,
    pixels_of,
    reduced_attention,
    toy_kinds,
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
SUMS = ["macs_dense", "macs", "params_dense", "params"]


@pytest.mark.parametrize("make", [toy_vit, toy_swin])
def test_the_dense_columns_are_the_dense_model_and_totals_are_sums(make):
    dense, model = count(make()), toy_moe(make(), layers={1})
    table = measure.macs(model).set_index("component")
    parts, total = table.iloc[:-1], table.loc["total"]
    assert list(table.index) == [*dense.tokens, "everything else", "total"]
    assert total["macs_dense"] == dense.total
    assert total["params_dense"] == count_parameters(make())
    assert total["params"] == count_parameters(model)
    by_module = {name: dense.by_module[name] for name in dense.tokens}
    assert parts["macs_dense"].drop("everything else").to_dict() == by_module
    np.testing.assert_allclose(parts[SUMS].sum(), total[SUMS].astype(float))
    saves_nothing = measure.macs(make(), toy_images(2))
    assert (saves_nothing["macs"] == saves_nothing["macs_dense"]).all()
    assert not saves_nothing["converted"].any()
    assert saves_nothing["active_fraction"].iloc[-1] == 1


def test_layers_with_everything_are_counted_as_stored():
    model, images = toy_kinds(toy_vit(), layers={1}), toy_images(6)
    layer, shares = moe_layers(model)[1], measure.routes(model, images).shares(1)
    row = measure.macs(model, images).iloc[1]
    router, sizes = 3 * 32 * 16, layer.sizes.numpy()
    assert row["macs"] == pytest.approx(router + 17 * 2 * 32 * (shares @ sizes))
    stored = len(layer.kept) * 65 + 32
    assert row["params"] == stored + 4 * 32 + 3 * 33
    assert row["macs_dense"] == 17 * 2 * 32 * 64
    assert measure.macs(model)["macs"].iloc[1] == pytest.approx(17 * layer.macs_per_token())


def test_shares_are_those_of_the_images_where_there_are_any():
    model, images = toy_moe(toy_vit()), toy_images(6)
    routes, table = measure.routes(model, images), measure.macs(model, images)
    calibrated, layer = measure.macs(model), moe_layers(model)[0]
    for found, shares in ((table, routes.shares(0)), (calibrated, layer.shares.numpy())):
        expected = shares @ layer.sizes.numpy()
        assert found["macs"].iloc[0] == pytest.approx(17 * (4 * 32 + 2 * 32 * expected))
        assert found["active_fraction"].iloc[0] == pytest.approx(expected / 64)
    assert table[["union_fraction", "experts"]].iloc[0].tolist() == [len(layer.kept) / 64, 4]
    assert set(table.loc[table["converted"], "share_source"]) == {"evaluated images"}
    assert measure.macs(model, routes=routes).equals(table)
    assert set(calibrated["share_source"]) == {"calibration", "dense"}
    assert "6 images" in table.attrs["caption"]


@pytest.mark.parametrize("active", [0.5, 1.0])
def test_counted_while_running_the_experts_cost_what_is_expected(active):
    """All experts of a layer are equal and each runs by itself: a real pass must agree."""
    config = MoeficationConfig(active=active, n_experts=4, router="centre")
    model = convert(toy_vit(), toy_images(2), config)
    set_dispatch(model, "sorted")
    expected = pytest.approx(measure.macs(model)["macs"].iloc[-1], abs=0.5)
    assert count(model, sites=()).total == expected


def test_attention_of_lower_rank_has_rows_of_its_own():
    model = reduced_attention(toy_moe(toy_vit(), layers={1}), queries=1)
    dense, own = count(toy_vit()), count(model).by_module
    table = measure.macs(model).set_index("component")[["macs_dense", "params_dense", "params"]]
    attention = count_parameters(toy_vit().blocks[2].attn), count_parameters(model.blocks[2].attn)
    row = [dense.by_module["blocks.2.attn"], *attention]
    assert table.loc["blocks.2.attn"].tolist() == row
    assert measure.macs(model)["macs"].iloc[-3] == own["blocks.2.attn"] < row[0]
    whole = [dense.total, count_parameters(toy_vit()), count_parameters(model)]
    assert table.loc["total"].tolist() == whole


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


def unread(kinds, *, block, count, tokens, hidden):
    """What ``count`` tokens cost in the attention and the MLP of a block."""
    costs = {"attn": count * 2 * D * (D + tokens), "mlp": count * 2 * D * hidden}
    return {f"blocks.{block}.{name}": UnreadMacs(kinds, each, each) for name, each in costs.items()}


ONE = {"block": 1, "count": 1, "tokens": 17, "hidden": 4 * D}
CAIT = {"depth": 1, "depth_token_only": 1, "init_values": 1.0}


@pytest.mark.parametrize(("build", "expected"), [
    (toy_vit, unread(("patch",), block=2, count=16, tokens=17, hidden=64)),
    (partial(small, reg_tokens=3),
     unread(("register", "patch"), block=1, count=19, tokens=20, hidden=4 * D)),
    (partial(small, class_token=False, global_pool="avg"), {}),  # the head reads all patches
    (partial(small, global_pool="avg"), unread(("cls",), **ONE)),
    (partial(small, class_token=False, reg_tokens=1, global_pool="avg"),
     unread(("register",), **ONE)),
    (toy_swin, {}),
    (partial(lively, SMALL_CONVNEXT), {}),
    (partial(small, Cait, **CAIT), {}),  # nothing is computed for what CLS alone asks for
])  # fmt: skip
def test_only_tokens_that_nothing_reads_are_counted(build, expected):
    assert unread_macs(build()) == expected


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
    model = convert(toy_vit(), IMAGES, MoeficationConfig(active=0.5, n_experts=16, router="centre"))
    row = measure.macs(model).set_index("component").loc["blocks.2.mlp"]
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
    table = measure.macs(make()).set_index("component")[["macs_unread_dense", "macs_unread"]]
    assert table.loc["blocks.2.mlp"].tolist() == pytest.approx([MLP, 0], abs=1)
    assert table.loc["total"].tolist() == pytest.approx([MLP + ATTENTION, ATTENTION])


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
