import copy

import pytest
import torch
from torch.nn.functional import normalize

from moee_analysis.errors import MoeeError
from moee_analysis.models.attention import heads_of, leading_attention
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import build_model
from moee_analysis.models.macs import count
from moee_analysis.models.merge_costs import (
    Evidence,
    KeyCosts,
    RandomCosts,
    WardCosts,
    ward_costs,
)
from moee_analysis.models.merging import MergingBlock, Tokens, join, merge_tokens, merging_blocks
from tests.helpers.models import pixels_of, reduced_attention, toy_swin, toy_vit

SCHEDULE = (3, 0, 4)


def by_importance(_=0):
    return WardCosts(by_importance=True)


COSTS = {
    "ward": lambda _: WardCosts(by_importance=False),
    "ward by importance": by_importance,
    "keys": lambda _: KeyCosts(),
    "keys by importance": lambda _: KeyCosts(by_importance=True),
    "random": lambda block: RandomCosts(32, seed=block),
}
FAMILIES = {  # a network, its settings, its leading tokens, whether its patches are averaged
    "ViT": ("vit_tiny_patch16_224", {}, 1, False),
    "DeiT": ("deit_tiny_patch16_224", {}, 1, False),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", {}, 2, False),
    "DINOv2 with registers": ("vit_small_patch14_reg4_dinov2", {"num_classes": 6}, 5, False),
    "mean of patches, CLS": ("vit_tiny_patch16_224", {"global_pool": "avg"}, 1, True),
    "mean of patches": (
        "vit_tiny_patch16_224", {"global_pool": "avg", "class_token": False}, 0, True,
    ),
}  # fmt: skip


def tokens_of_blocks(model, x):
    """What leaves each block."""
    seen = {}
    with watch(dict(enumerate(model.blocks)), seen.__setitem__, "outputs"), torch.no_grad():
        model(x)
    return list(seen.values())


def ward(x, sizes, paid=None):
    """Costs by loops, for patches alone."""
    found = []
    for image in range(len(x)):
        rows = []
        for a in range(0, x.shape[1], 2):
            row = []
            for b in range(1, x.shape[1], 2):
                s, t = sizes[image, a].item(), sizes[image, b].item()
                cost = s * t / (s + t) * float((x[image, a] - x[image, b]).square().sum())
                if paid is not None:
                    most = max(float(paid[image, a]) / s, float(paid[image, b]) / t)
                    cost *= most**0.5
                row.append(cost)
            rows.append(row)
        found.append(rows)
    return torch.tensor(found)


def slow_merge(x, sizes, costs, merges, leading):
    """The merged tokens of an image, and the numbers of the first ones in each, by loops."""
    groups = [[n] for n in range(len(x))]
    pairs = []
    for row, of_a in enumerate(costs.tolist()):
        best = min(range(len(of_a)), key=of_a.__getitem__)
        pairs.append((of_a[best], leading + 2 * row, leading + 2 * best + 1))
    for _, a, b in sorted(pairs)[:merges]:
        groups[b] += groups[a]
        groups[a] = []
    groups = [group for group in groups if group]
    means = []
    for group in groups:
        weight = sum(sizes[n] for n in group)
        means.append(sum(sizes[n] * x[n] for n in group) / weight)
    return torch.stack(means), groups


def drawn(*, tokens=9, images=2):
    """Random tokens, their sizes, and how important they are."""
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(images, tokens, 32, generator=draws)
    sizes = torch.randint(1, 5, (images, tokens), generator=draws).float()
    return x, sizes, torch.rand(images, tokens, generator=draws)


def evidence(x, sizes, *, leading=0, keys=None):
    return Evidence(x, sizes, leading, toy_vit(depth=1).blocks[0].attn, x, keys)


def test_ward_costs_are_those_of_a_loop_over_pairs():
    x, sizes, paid = drawn()
    for known in (None, paid):
        costs = ward_costs(x, sizes, known)
        torch.testing.assert_close(costs, ward(x, sizes, known), rtol=1e-4, atol=1e-4)


def test_a_ward_cost_is_what_the_sum_of_squares_grows_by():
    x, sizes, _ = drawn()
    (a, b), (s, t) = x[0, :2], sizes[0, :2]
    mean = (s * a + t * b) / (s + t)
    grows = s * (a - mean).square().sum() + t * (b - mean).square().sum()
    assert float(ward_costs(x, sizes)[0, 0, 0]) == pytest.approx(float(grows), rel=1e-4)


def test_ward_costs_by_importance_are_those_of_the_attention_of_cls():
    x, sizes, _ = drawn()
    seen = evidence(x, sizes, leading=1)
    paid = leading_attention(seen.attention, x, sizes)
    costs, weights = WardCosts(by_importance=True)(seen)
    torch.testing.assert_close(costs, ward_costs(x[:, 1:], sizes[:, 1:], paid[:, 1:]))
    assert weights is sizes


def test_costs_of_keys_are_less_their_cosines():
    x, sizes, _ = drawn(tokens=7)
    keys = torch.randn(2, 3, 7, 4, generator=torch.Generator().manual_seed(0))
    seen = evidence(x, sizes, leading=1, keys=keys)
    costs, weights = KeyCosts()(seen)
    assert weights is sizes
    for image, a, b in ((0, 1, 2), (1, 5, 4)):
        one, other = (normalize(keys[image, :, n].flatten(), dim=0) for n in (a, b))
        found = float(costs[image, (a - 1) // 2, (b - 1) // 2])
        assert found == pytest.approx(-float(one @ other), abs=1e-6)
    same, weights = KeyCosts(by_importance=True)(seen)
    torch.testing.assert_close(same, costs)
    torch.testing.assert_close(weights, leading_attention(seen.attention, x, sizes))


@pytest.mark.parametrize(("leading", "merges"), [(1, 1), (1, 4), (2, 3), (0, 2)])
def test_tokens_merge_as_in_a_slow_loop(leading, merges):
    x, sizes, _ = drawn(tokens=leading + 8)
    block = MergingBlock(toy_vit(depth=1).blocks[0], by_importance(), merges, leading)
    seen = evidence(x, sizes, leading=leading)
    costs, _ = block.costs(seen)
    tokens = block.merge(Tokens(x, sizes), seen)
    for image in range(2):
        wanted, groups = slow_merge(x[image], sizes[image], costs[image], merges, leading)
        torch.testing.assert_close(tokens.x[image], wanted)
        for number, group in enumerate(groups):
            assert (tokens.place[image, group] == number).all()
        assert tokens.sizes[image].sum() == sizes[image].sum()


def test_joined_tokens_are_means_by_their_weights():
    x = torch.tensor([[[1.0], [2.0], [4.0]]])
    weights = torch.tensor([[1.0, 1.0, 3.0]])
    gone, target = torch.tensor([[1]]), torch.tensor([[2]])
    found = join(Tokens(x, torch.tensor([[1.0, 2.0, 1.0]])), gone, target, weights)
    assert found.x.flatten().tolist() == [1.0, 3.5]
    assert found.sizes.tolist() == [[1, 3]]
    assert found.place.tolist() == [[0, 1, 1]]


@pytest.mark.parametrize("costs", COSTS)
def test_no_merges_leave_the_model_exactly_as_it_is(costs):
    model = toy_vit()
    x = pixels_of(model)
    merged = merge_tokens(model, (0, 0, 0), COSTS[costs])
    assert merging_blocks(merged) is None
    torch.testing.assert_close(merged(x), model(x), rtol=0, atol=0)
    late = merge_tokens(model, (0, 0, 1), COSTS[costs])  # after the last attention: not read by CLS
    torch.testing.assert_close(late(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("costs", COSTS)
def test_sizes_add_up_to_the_patches_and_leading_tokens_stay_alone(costs):
    model = toy_vit()
    merged = merge_tokens(model, SCHEDULE, COSTS[costs])
    x, before = pixels_of(model), 17
    for tokens, merges in zip(tokens_of_blocks(merged, x), SCHEDULE, strict=True):
        before -= merges
        assert tokens.x.shape[1] == tokens.sizes.shape[1] == before
        assert (tokens.sizes.sum(dim=1) == 17).all()
        assert (tokens.sizes[:, 0] == 1).all()
        assert (tokens.place[:, 0] == 0).all()
        assert (tokens.place[:, 1:] > 0).all()
        counted = torch.stack([torch.bincount(image, minlength=before) for image in tokens.place])
        torch.testing.assert_close(counted.float(), tokens.sizes)


def test_equal_tokens_that_merge_change_nothing():
    torch.manual_seed(0)
    model = toy_vit()
    half = torch.randn(2, 8, 32)
    pairs = half.repeat_interleave(2, dim=1)  # patch 2n is patch 2n + 1
    x = torch.cat([torch.randn(2, 1, 32), pairs], dim=1)
    merged = merge_tokens(model, (8, 0, 0), COSTS["ward"])
    with torch.no_grad():
        torch.testing.assert_close(merged.blocks(x), model.blocks(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("costs", [name for name in COSTS if name != "random"])
def test_an_image_does_not_depend_on_its_neighbours(costs):
    model = toy_vit()
    merged, x = merge_tokens(model, SCHEDULE, COSTS[costs]), pixels_of(model, count=5)
    each = torch.cat([merged(image[None]) for image in x])
    torch.testing.assert_close(merged(x), each, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_vision_transformers_merge(family):
    name, settings, leading, averaged = FAMILIES[family]
    torch.manual_seed(0)
    size = 56 if "14" in name else 64
    model = build_model(name, depth=2, img_size=size, **settings).eval()
    costs = COSTS["ward" if averaged else "ward by importance"]
    merged, x = merge_tokens(model, (4, 0), costs), torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert merged(x).shape == model(x).shape
        features = merged.forward_features(x)
        assert features.shape == model.forward_features(x).shape
    for tokens in tokens_of_blocks(merged, x):
        assert (tokens.sizes[:, :leading] == 1).all()
    if averaged:  # a mean of all patches, not of the tokens that are left
        mean = features[:, leading:].mean(dim=1)
        torch.testing.assert_close(
            merged.forward_head(features, pre_logits=True), merged.fc_norm(mean)
        )


def test_the_attention_of_cls_is_that_of_the_softmax():
    dense = toy_vit().blocks[0].attn
    x, sizes = torch.randn(2, 6, 32), torch.randint(1, 4, (2, 6)).float()
    q, k, _ = heads_of(dense, x)
    wanted = (q @ k.mT + sizes.log()[:, None, None]).softmax(dim=-1)[:, :, 0].mean(dim=1)
    torch.testing.assert_close(leading_attention(dense, x, sizes), wanted)


def test_reduced_attention_counts_sizes_too():
    torch.manual_seed(0)
    model = reduced_attention(toy_vit(), ranks=(16, 16))
    x = pixels_of(model)
    wanted = merge_tokens(toy_vit(), (0, 4, 0), COSTS["ward by importance"])
    merged = merge_tokens(model, (0, 4, 0), COSTS["ward by importance"])
    torch.testing.assert_close(merged(x), wanted(x), rtol=1e-4, atol=1e-4)


def test_macs_are_those_of_an_independent_count():
    model = toy_vit()
    dim, hidden, patches, macs, tokens = 32, 64, 16, 0, 17
    for merges in SCHEDULE:
        macs += 4 * dim * dim * tokens + 2 * dim * tokens**2
        if merges:  # all pairs; the query's way back to the tokens, and their product
            of_a = -(-(tokens - 1) // 2)
            macs += of_a * (tokens - 1 - of_a) * dim
            macs += 2 * dim * dim + 2 * dim * tokens
        tokens -= merges
        macs += 2 * dim * hidden * tokens
    macs += patches * 3 * 8 * 8 * dim + dim * 6
    assert count(merge_tokens(model, SCHEDULE, by_importance)).total == macs


def test_gradients_reach_all_tokens_through_merging():
    model = toy_vit()
    merged, x = merge_tokens(model, SCHEDULE, by_importance), pixels_of(model).requires_grad_()
    merged(x).sum().backward()
    assert (x.grad.flatten(1).abs().sum(dim=1) > 0).all()


def test_a_block_by_itself_is_refused():
    model = toy_vit()
    merged, x = merge_tokens(model, SCHEDULE, by_importance), pixels_of(model)
    for call in (lambda: merged.forward_intermediates(x), lambda: merged.blocks[1](x)):
        with pytest.raises(MoeeError, match="called by itself"):
            call()
    merged.set_grad_checkpointing()
    with pytest.raises(MoeeError, match="without checkpoints"):
        merged.train()(x)


def test_schedules_that_do_not_fit_are_refused():
    for schedule, told in (((1, 1), "3 blocks"), ((9, 0, 0), "at most 8"), ((8, 5, 0), "block 1")):
        with pytest.raises(MoeeError, match=told):
            merge_tokens(toy_vit(), schedule, by_importance)


@pytest.mark.parametrize(
    "model",
    [
        toy_swin,
        lambda: build_model("test_convnext"),
        lambda: build_model("xcit_nano_12_p16_224", depth=1),
        lambda: build_model("vit_tiny_patch16_224", depth=1, qk_norm=True),
    ],
)
def test_other_networks_are_refused(model):
    network = model()
    with pytest.raises(MoeeError, match="plain attention"):
        merge_tokens(network, [1] * len(getattr(network, "blocks", [0])), by_importance)


def test_the_dense_model_stays_as_it_was():
    model = toy_vit()
    before = copy.deepcopy(model)
    merge_tokens(model, SCHEDULE, by_importance)
    assert merging_blocks(model) is None
    assert set(model.state_dict()) == set(before.state_dict())
    assert set(merge_tokens(model, SCHEDULE, by_importance).state_dict()) == set(
        before.state_dict()
    )
