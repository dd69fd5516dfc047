import copy

import pytest
import torch
from timm.layers import Attention
from timm.models.vision_transformer import VisionTransformer
from torch.nn.attention import SDPBackend, sdpa_kernel

from moee_analysis.errors import MoeeError
from moee_analysis.models.attention import Factors, Reduction, find_attentions, low_rank, site_of
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import replace_module
from tests.helpers import models
from tests.helpers.families import small
from tests.helpers.models import CLASSES, SMALL_CONVNEXT, lively, toy_swin, toy_vit


def attention(**settings):
    """A random attention of 2 heads of 8 dimensions, and 5 tokens of 3 images to look at."""
    torch.manual_seed(0)
    dense = Attention(16, num_heads=2, **settings).eval().requires_grad_(requires_grad=False)
    return dense, torch.randn(3, 5, 16)


def maps(rank, *, seed):
    drawn = torch.Generator().manual_seed(seed)
    return Factors(*torch.randn(2, 2, 8, rank, generator=drawn, dtype=torch.float64))


def reduced(dense, *ranks, queries=None):
    """Maps of these ranks of scores and values, and the attention that has them."""
    mean = torch.randn(2, 8, generator=torch.Generator().manual_seed(3))
    reduction = Reduction(maps(ranks[0], seed=1), maps(ranks[1], seed=2), mean, queries)
    return reduction, low_rank(site_of("attn", dense), dense, reduction)


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


RANKS = [(3, 5), (7, 2), (4, 4), (8, 8), (1, 8), (0, 4), (4, 0), (0, 0)]


@pytest.mark.parametrize(("ranks", "biases"), [
    *[(ranks, {"qkv_bias": True}) for ranks in RANKS], *[(ranks, {}) for ranks in RANKS[:3]],
    *[(ranks, {"proj_bias": False}) for ranks in RANKS[:3]],
])  # fmt: skip
def test_low_rank_attention_is_dense_attention_with_maps_in_its_heads(ranks, biases):
    dense, x = attention(**biases)
    reduction, found = reduced(dense, *ranks)
    assert torch.allclose(found(x).double(), slow(dense, x, reduction), atol=1e-4)
    with sdpa_kernel(SDPBackend.MATH):
        plain = found(x)
    assert torch.allclose(found(x), plain, atol=1e-5)


SHAPES = [((3, 5), None), ((7, 2), None), ((4, 4), None), ((3, 5), 2)]


@pytest.mark.parametrize(("ranks", "queries"), SHAPES)
def test_gradients_are_right(ranks, queries):
    dense, _ = attention(qkv_bias=True)
    _, found = reduced(dense, *ranks, queries=queries)
    names, values = zip(*found.double().named_parameters(), strict=True)
    values = [value.detach().clone().requires_grad_() for value in values]
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(found, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize(("ranks", "queries"), SHAPES)
def test_it_compiles_and_exports_for_any_number_of_images(ranks, queries, tmp_path):
    dense, x = attention(qkv_bias=True)
    _, found = reduced(dense, *ranks, queries=queries)
    compiled = torch.compile(found, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), found(x))
    images = {"x": {0: torch.export.Dim.AUTO}}
    exported = torch.export.export(found, (x,), dynamic_shapes=images)
    torch.export.save(exported, tmp_path / "attention.pt2")
    more = torch.randn(7, 5, 16)
    again = torch.export.load(tmp_path / "attention.pt2").module()
    torch.testing.assert_close(again(more), found(more))


def test_only_tokens_that_are_read_are_asked_for():
    dense, x = attention(qkv_bias=True)
    site = site_of("attn", dense)
    whole = Factors.whole(site)
    reduction = Reduction(whole, whole, torch.zeros(2, 8), queries=2)
    found = low_rank(site, dense, reduction)(x)
    assert torch.allclose(found[:, :2], dense(x)[:, :2], atol=1e-6)
    assert not found[:, 2:].any()


def test_attention_of_all_dimensions_is_the_dense_one():
    model, x = toy_vit(), torch.randn(2, 3, 32, 32)
    other = copy.deepcopy(model)
    for site in find_attentions(model):
        whole = Factors.whole(site)
        reduction = Reduction(whole, whole, torch.zeros(2, site.head_dim))
        replace_module(other, site.name, low_rank(site, site.module(model), reduction))
    assert torch.allclose(other(x), model(x), atol=1e-5)


def test_what_it_costs_is_counted_as_it_runs():
    dense, _ = attention(qkv_bias=True)
    _, found = reduced(dense, 3, 5)
    assert count_parameters(found) == 2 * (3 * (2 * 16 + 1) + 5 * 2 * 16) + 16
    for queries, asked in ((1, 1), (None, 17)):
        macs = count(models.reduced_attention(toy_vit(), ranks=(3, 5), queries=queries)).by_module
        assert macs["blocks.2.attn"] == 2 * (3 + 5) * (32 * (asked + 17) + 17 * asked)
    site = find_attentions(toy_vit())[2]
    assert site.macs(17) == count(toy_vit()).by_module[site.name]


def test_a_mask_joins_the_scores_of_keys():
    """A token that counts twice is two tokens."""
    dense, x = attention(qkv_bias=True)
    twice = torch.cat([x, x[:, -1:]], dim=1)
    sizes = torch.tensor([1.0, 1, 1, 1, 2])
    for queries, ranks in ((None, (3, 5)), (None, (5, 3)), (2, (3, 5))):
        _, found = reduced(dense, *ranks, queries=queries)
        torch.testing.assert_close(found(x, sizes.log()[None, None, None]), found(twice)[:, :-1])


def test_a_causal_mask_is_refused():
    found, x = models.reduced_attention(toy_vit()).blocks[2].attn, torch.randn(1, 17, 32)
    with pytest.raises(MoeeError, match="is_causal"):
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
        lambda: small("small_mobilevit"),
        lambda: VisionTransformer(
            img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, qk_norm=True,
            num_classes=len(CLASSES),
        ),
    ],
    ids=["windows", "convolutions", "windows as images", "norms inside"],
)  # fmt: skip
def test_models_without_plain_attention_are_refused(build):
    with pytest.raises(MoeeError, match="plain self-attention") as error:
        find_attentions(build())
    assert "dense" in error.value.hint
