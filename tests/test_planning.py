from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from moee_analysis import partition, planning
from moee_analysis.clustering import Clusters
from moee_analysis.errors import MoeeError
from moee_analysis.models import find_mlps
from moee_analysis.planning import plan_layer, plan_layers, sampled
from moee_analysis.routers import ConstantRouter, CosineRouter, NearestRouter, TokenKindRouter
from moee_analysis.selection import rank_neurons
from tests.makers import best, quick
from tests.planted import EAST, LABELS, NORTH, PLANTED, ROWS, planted
from tests.toys import toy_images, toy_swin, toy_vit

IMAGES = toy_images(8)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plan the planted layer with the clusters that are known."""
    found = Clusters(LABELS)
    monkeypatch.setattr(partition, "clustered", lambda *_, **__: (ROWS, found))
    return lambda **settings: plan_layer(PLANTED, quick(**settings).resolved(), root=tmp_path)


def order_of(plan):
    return rank_neurons(plan.scores.neurons).order


# One layer


def test_noise_rerouted_counts_for_the_expert_it_is_routed_to(planned):
    plan = planned(noise="reroute")
    assert np.bincount(plan.members).tolist() == [70, 20]
    np.testing.assert_allclose(plan.shares, [70 / 90, 20 / 90])
    assert set(order_of(plan)[0, :2]) == {0, 2}


def test_noise_dropped_counts_for_no_scores_but_is_still_routed(planned):
    plan = planned(noise="drop")
    assert plan.members.tolist() == LABELS.tolist()
    assert order_of(plan)[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(plan.shares, [70 / 90, 20 / 90])
    np.testing.assert_allclose(
        plan.scores.means[1], PLANTED.sample.hidden[40:60].astype(float).mean(axis=0), atol=1e-12
    )


def test_noise_as_the_rest_gets_an_expert_of_its_own(planned):
    plan = planned(noise="rest")
    assert order_of(plan)[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(plan.shares.sum(), 1)


def test_a_plan_has_the_router_of_its_clusters(planned):
    plan = planned()
    assert plan.converted
    assert isinstance(plan.router(), CosineRouter)
    np.testing.assert_array_equal(plan.router().centres, plan.partition.centres)


def test_one_expert_scores_neurons_by_their_variance_over_all_tokens(planned):
    plan = planned(experts="one")
    variance = PLANTED.sample.hidden.astype(float).var(axis=0)
    np.testing.assert_allclose(plan.scores.neurons[0], variance, rtol=1e-9)
    assert isinstance(plan.router(), ConstantRouter)
    assert plan.router().macs == 0
    assert plan.shares.tolist() == [1.0]


def test_a_layer_without_clusters_keeps_its_reason(tmp_path, monkeypatch):
    nothing = Clusters(LABELS, "1 clusters found")
    monkeypatch.setattr(partition, "clustered", lambda *_, **__: (ROWS, nothing))
    plan = plan_layer(PLANTED, quick().resolved(), root=tmp_path)
    assert not plan.converted
    assert plan.partition.reason == "1 clusters found"
    assert plan.partition.noise_share == pytest.approx(30 / 90)


# Leading tokens, and tokens that nothing reads

PAIRED = planted((NORTH, 20, 0), (EAST, 40, 1), images=10)  # 6 tokens, the first 2 to the north


def test_leading_tokens_have_experts_before_those_of_the_others(tmp_path):
    settings = best(metric="outputs").resolved()
    plan = plan_layer(PAIRED, settings, prefix=(0, 1), root=tmp_path)
    position = PAIRED.sample.position
    assert (plan.members[position == 0] == 0).all()
    assert (plan.members[position == 1] == 1).all()
    assert plan.members[position > 1].min() == 2
    np.testing.assert_allclose(plan.shares[:2], 1 / 6)
    assert plan.tokens == 6
    router = plan.router()
    assert isinstance(router, TokenKindRouter)
    images = torch.zeros(10, 6, 4)
    images[PAIRED.sample.image, position] = torch.from_numpy(PAIRED.sample.inputs).float()
    chosen = router(images).reshape(10, 6)
    np.testing.assert_array_equal(chosen[PAIRED.sample.image, position], plan.members)


def test_leading_tokens_of_one_kind_share_an_expert(tmp_path):
    plan = plan_layer(PAIRED, quick(experts="one").resolved(), prefix=(0, 0), root=tmp_path)
    assert plan.shares == pytest.approx([1 / 3, 2 / 3])
    assert order_of(plan)[:, 0].tolist() == [0, 1]


def test_tokens_that_nothing_reads_share_an_expert_that_keeps_no_neuron(tmp_path):
    plan = plan_layer(PAIRED, quick().resolved(), prefix=(0, 1), unread=True, root=tmp_path)
    assert plan.constant.tolist() == [False, False, True]
    assert plan.router().macs == 0
    assert plan.shares == pytest.approx([1 / 6, 1 / 6, 2 / 3])


# All layers of a model


def plans_of(root, *, model=None, settings=quick, **given):
    return plan_layers(model or toy_vit(), IMAGES, settings(**given).resolved(), root=root)


def test_layers_that_are_not_asked_for_stay_dense(tmp_path):
    plans = plans_of(tmp_path, layers=(1,))
    assert [plan.converted for plan in plans] == [False, True, False]
    assert [plan.partition.reason for plan in plans] == ["not asked for", "", "not asked for"]


@pytest.mark.parametrize("layers", [(), (3,), (-1, 0)])
def test_layers_that_do_not_exist_are_refused(tmp_path, layers):
    with pytest.raises(MoeeError, match="layers between 0 and 2"):
        plans_of(tmp_path, layers=layers)


def test_clusters_and_scores_are_found_again_in_the_store(tmp_path, monkeypatch):
    first = plans_of(tmp_path)
    for module, name in (
        (partition, "labels_of"), (partition, "reduce_dimensions"), (planning, "score"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("again"))
    for one, other in zip(first, plans_of(tmp_path, variance_kept=0.5), strict=True):
        np.testing.assert_array_equal(one.partition.centres, other.partition.centres)
        np.testing.assert_array_equal(one.scores.neurons, other.scores.neurons)


def test_every_part_of_a_score_is_found_again_by_what_decides_it(tmp_path):
    first, *others = (
        plans_of(tmp_path, settings=best, layers=(0,), **changed)[0].scores
        for changed in ({}, {"order": "obs"}, {"metric": "outputs"}, {})
    )
    assert not np.allclose(first.neurons, others[0].neurons)
    assert not np.allclose(first.weight, others[1].weight)
    for name, values in vars(first).items():
        np.testing.assert_array_equal(values, vars(others[-1])[name])


def test_cls_has_an_expert_and_the_last_layer_a_constant_one(tmp_path):
    plans = plans_of(tmp_path, settings=best)
    assert [plan.prefix for plan in plans] == 3 * [(0,)]
    assert [plan.constant.any() for plan in plans] == [False, False, True]
    assert all(plan.shares[0] == pytest.approx(1 / 17) for plan in plans)
    assert plans[2].constant.tolist() == [False, True]
    assert all(isinstance(plan.router().inner, NearestRouter) for plan in plans[:2])


def test_registers_share_an_expert_and_cls_has_its_own(tmp_path):
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=6, reg_tokens=3
    )
    model.pretrained_cfg = toy_vit().pretrained_cfg
    model.eval().requires_grad_(requires_grad=False)
    (plan,) = plans_of(tmp_path, model=model, settings=best)
    assert plan.prefix == (0, 1, 1, 1)
    assert plan.shares[:2] == pytest.approx([1 / 20, 3 / 20])


@pytest.mark.parametrize("pieces", [{"tokens": "alike"}, {"tokens": "alike", "unread": "routed"}])
def test_tokens_alike_are_routed_by_their_content(tmp_path, pieces):
    plans = plans_of(tmp_path, settings=best, **pieces)
    assert [plan.prefix for plan in plans[:2]] == [(), ()]
    assert plans[2].prefix == ((0,) if len(pieces) == 1 else ())


def test_a_model_of_patches_alone_has_nothing_but_routed_tokens(tmp_path):
    for plan in plans_of(tmp_path, model=toy_swin(), settings=best):
        assert plan.prefix == ()
        assert not plan.constant.any()
        assert isinstance(plan.router(), NearestRouter)


# What is recorded


@pytest.mark.parametrize(
    ("config", "hidden", "gradients"),
    [
        (quick(), True, False),
        (best(), False, True),
        (best(metric="outputs"), False, False),
        (quick(metric="fisher"), False, True),
    ],
)
def test_only_what_a_recipe_needs_is_recorded(tmp_path, config, hidden, gradients):
    recording = sampled(toy_vit(), IMAGES, config.resolved(), root=tmp_path)
    sample = recording.layer(find_mlps(toy_vit())[0])
    assert (sample.hidden is not None) is hidden
    assert (sample.directions is not None) is gradients
