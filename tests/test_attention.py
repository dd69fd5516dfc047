from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.attention import Factors, Reduction, find_attentions, low_rank, site_of
from moee_analysis.counting import count, count_parameters
from moee_analysis.errors import MoeeError
from moee_analysis.layers import replace_module
from tests.makers import SMALL_CONVNEXT, lively
from tests.toys import CLASSES, reduced_attention, toy_swin, toy_vit


def attention(**settings):
    """A random attention of 2 heads of 8 dimensions, and 5 tokens of 3 images to look at."""
    torch.manual_seed(0)
    dense = Attention(16, num_heads=2, **settings).eval().requires_grad_(requires_grad=False)
    return dense, torch.randn(3, 5, 16)


def maps(ranks, *, seed):
    drawn = torch.Generator().manual_seed(seed)
    return Factors(
        [torch.randn(8, r, generator=drawn, dtype=torch.float64) for r in ranks],
        [torch.randn(8, r, generator=drawn, dtype=torch.float64) for r in ranks],
    )


def slow(dense, x, reduction):
    """Head by head and token by token, with the maps in full."""
    outputs = []
    for image in x.double():
        q, k, v = (image @ dense.qkv.weight.double().T + _bias(dense)).split(16, dim=-1)
        heads = []
        for head in range(2):
            own = slice(8 * head, 8 * head + 8)
            M = reduction.scores.left[head] @ reduction.scores.right[head].T
            V = reduction.values.left[head] @ reduction.values.right[head].T
            mean = reduction.mean[head].double()
            rows = []
            for token in q[:, own]:
                weights = torch.stack([token @ M @ key for key in k[:, own]]) * 8**-0.5
                gathered = weights.softmax(dim=0) @ v[:, own]
                rows.append(mean + V @ (gathered - mean))
            heads.append(torch.stack(rows))
        out = torch.cat(heads, dim=1) @ dense.proj.weight.double().T
        outputs.append(out + (dense.proj.bias if dense.proj.bias is not None else 0))
    return torch.stack(outputs)


def _bias(dense):
    return 0 if dense.qkv.bias is None else dense.qkv.bias.double()


# What it computes


@pytest.mark.parametrize("biases", [{}, {"qkv_bias": True}, {"proj_bias": False}])
@pytest.mark.parametrize("ranks", [((3, 5), (2, 8)), ((0, 4), (1, 3)), ((2, 2), (0, 6))])
def test_low_rank_attention_is_dense_attention_with_maps_in_its_heads(ranks, biases):
    dense, x = attention(**biases)
    drawn = torch.Generator().manual_seed(3)
    mean = torch.randn(2, 8, generator=drawn)
    reduction = Reduction(maps(ranks[0], seed=1), maps(ranks[1], seed=2), mean)
    found = low_rank(site_of("attn", dense), dense, reduction)(x)
    assert torch.allclose(found.double(), slow(dense, x, reduction), atol=1e-4)


def test_only_tokens_that_are_read_are_asked_for():
    dense, x = attention(qkv_bias=True)
    whole = Factors([torch.eye(8)] * 2, [torch.eye(8)] * 2)
    reduction = Reduction(whole, whole, torch.zeros(2, 8), queries=2)
    found = low_rank(site_of("attn", dense), dense, reduction)(x)
    assert torch.allclose(found[:, :2], dense(x)[:, :2], atol=1e-6)
    assert not found[:, 2:].any()


def test_attention_of_all_dimensions_is_the_dense_one():
    model, x = toy_vit(), torch.randn(2, 3, 32, 32)
    reduced = copy.deepcopy(model)
    for site in find_attentions(model):
        whole = Factors([torch.eye(site.head_dim)] * 2, [torch.eye(site.head_dim)] * 2)
        reduction = Reduction(whole, whole, torch.zeros(2, site.head_dim))
        replace_module(reduced, site.name, low_rank(site, site.module(model), reduction))
    assert torch.allclose(reduced(x), model(x), atol=1e-5)


def test_what_it_costs_is_counted_as_it_runs():
    dense, _ = attention(qkv_bias=True)
    reduction = Reduction(maps((3, 5), seed=1), maps((2, 6), seed=2), torch.zeros(2, 8))
    found = low_rank(site_of("attn", dense), dense, reduction)
    assert count_parameters(found) == (2 * 16 + 1) * 8 + 2 * 16 * 8 + 16
    asked = count(reduced_attention(toy_vit(), ranks=(3, 5), queries=1))
    assert asked.by_module["blocks.2.attn"] == 2 * 8 * (32 * (1 + 17) + 17)
    site = find_attentions(toy_vit())[2]
    assert site.macs(17) == count(toy_vit()).by_module[site.name]


def test_a_mask_is_refused():
    found, x = reduced_attention(toy_vit()).blocks[2].attn, torch.randn(1, 17, 32)
    with pytest.raises(MoeeError, match="without a mask"):
        found(x, attn_mask=torch.zeros(17, 17))
    with pytest.raises(MoeeError, match="without a mask"):
        found(x, is_causal=True)


# Where it can stand


def test_attentions_are_found_in_order():
    sites = find_attentions(toy_vit())
    assert [site.name for site in sites] == [f"blocks.{i}.attn" for i in range(3)]
    assert {(site.dim, site.heads, site.head_dim) for site in sites} == {(32, 2, 16)}


@pytest.mark.parametrize(
    "build",
    [
        toy_swin,
        lambda: lively(SMALL_CONVNEXT),
        lambda: VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, qk_norm=True,
            num_classes=len(CLASSES),
        ),
    ],
    ids=["windows", "convolutions", "norms inside"],
)  # fmt: skip
def test_models_without_plain_attention_are_refused(build):
    with pytest.raises(MoeeError, match="plain self-attention") as error:
        find_attentions(build())
    assert "dense" in error.value.hint
