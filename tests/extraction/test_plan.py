from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.errors import MoeeError
from moee_analysis.extraction import plan as planning
from moee_analysis.extraction.cluster.clusters_to_router import Partition
from moee_analysis.extraction.experts.variance_share import rank_neurons
from moee_analysis.extraction.plan import LayerPlan, plan_layers
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter, TokenKindRouter
from tests.helpers.makers import best, quick
from tests.helpers.planted import EAST, LABELS, NORTH, PLANTED, SITE, UP, Made, planted
from tests.helpers.toys import toy_images, toy_swin, toy_vit

IMAGES = toy_images(8)


@pytest.fixture
def planned(tmp_path, monkeypatch):
    """Plan the planted layer with the clusters that are known, its tokens in three parts."""

    def plan(*, labels=LABELS, layer=PLANTED, settings=quick, **given):
        monkeypatch.setattr(planning, "clustered", lambda *_, **__: labels)
        made = Made([layer], tmp_path, settings(**given).resolved(), cuts=(30, 50))
        (found,) = plan_layers(made)
        return found

    return plan


def order_of(plan):
    return rank_neurons(plan.scores.neurons).order


# One layer


def test_noise_rerouted_counts_for_the_expert_it_is_routed_to(planned):
    plan = planned(noise="reroute")
    assert plan.known.weight.tolist() == plan.known.routed.tolist() == [70, 20]
    np.testing.assert_allclose(plan.shares, [70 / 90, 20 / 90])
    assert set(order_of(plan)[0, :2]) == {0, 2}


def test_noise_dropped_counts_for_no_scores_but_is_still_routed(planned):
    plan = planned(noise="drop")
    _, members = plan.assignment.of(PLANTED)
    assert members.tolist() == LABELS.tolist()
    assert order_of(plan)[:, 0].tolist() == [0, 1]
    assert plan.known.weight.tolist() == [40, 20]
    np.testing.assert_allclose(plan.shares, [70 / 90, 20 / 90])
    np.testing.assert_allclose(
        plan.known.means[1], PLANTED.sample.hidden[40:60].astype(float).mean(axis=0), atol=1e-12
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


def test_a_layer_without_clusters_keeps_its_reason(planned):
    plan = planned(labels=np.minimum(LABELS, 0))
    assert not plan.converted
    assert plan.partition.reason == "1 clusters found"
    assert plan.partition.noise_share == pytest.approx(30 / 90)
    assert plan.known is plan.scores is None


BETWEEN = planted((NORTH, 40, 0), (EAST, 40, 1), (NORTH, 10, 2), (EAST, 10, 2), spread=0)


@pytest.mark.parametrize("order", ["variance", "obs"])
@pytest.mark.parametrize("noise", ["reroute", "drop", "rest"])
def test_an_expert_that_no_token_is_routed_to_is_left_out_of_everything(planned, noise, order):
    labels = np.repeat([0, 2, 1], [40, 40, 20])  # the mean of the last is nobody's nearest
    plan = planned(labels=labels, layer=BETWEEN, noise=noise, order=order)
    assert plan.partition.experts == plan.assignment.experts == 2
    assert plan.known.routed.tolist() == [50, 50]
    assert plan.known.weight.tolist() == ([50, 50] if noise == "reroute" else [40, 40])
    assert plan.scores.neurons.shape == (2, 6)
    assert plan.scores.weight.shape == (2,)
    routed, members = plan.assignment.of(BETWEEN)
    assert np.bincount(routed).tolist() == [50, 50]
    assert np.bincount(members[members >= 0]).tolist() == plan.known.weight.tolist()
    if noise != "reroute":
        assert order_of(plan)[:, 0].tolist() == [0, 1]


def test_a_layer_that_routes_everything_to_one_expert_stays_dense(planned):
    layer = planted((NORTH, 40, 0), (2 * NORTH, 40, 1), spread=0)
    plan = planned(labels=np.repeat([0, 1], 40), layer=layer)
    assert plan.partition.reason == "all tokens route to one expert"
    assert not plan.converted


# Leading tokens, and tokens that nothing reads

PAIRED = planted((NORTH, 20, 0), (EAST, 40, 1), images=10)  # 6 tokens, the first 2 to the north


@pytest.fixture
def paired(tmp_path, monkeypatch):
    """Plan the layer of two leading tokens, of such kinds, and four others."""

    def plan(kinds=("cls", "dist"), *, unread=(), settings=quick, layer=PAIRED, **given):
        monkeypatch.setattr(planning, "unread_patches", lambda _: frozenset(unread))
        config = settings(**given).resolved()
        (found,) = plan_layers(Made([layer], tmp_path, config, cuts=(6, 42), kinds=kinds))
        return found

    return plan


def test_leading_tokens_have_experts_before_those_of_the_others(paired):
    plan = paired(settings=best, metric="outputs")
    _, members = plan.assignment.of(PAIRED)
    position = PAIRED.sample.position
    assert (members[position == 0] == 0).all()
    assert (members[position == 1] == 1).all()
    assert members[position > 1].min() == 2
    np.testing.assert_allclose(plan.shares[:2], 1 / 6)
    assert plan.tokens == 6
    router = plan.router()
    assert isinstance(router, TokenKindRouter)
    images = torch.zeros(10, 6, 4)
    images[PAIRED.sample.image, position] = torch.from_numpy(PAIRED.sample.inputs).float()
    chosen = router(images).reshape(10, 6)
    np.testing.assert_array_equal(chosen[PAIRED.sample.image, position], members)


def test_leading_tokens_of_one_kind_share_an_expert(paired):
    plan = paired(("register", "register"), tokens="kinds", experts="one")
    assert plan.shares == pytest.approx([1 / 3, 2 / 3])
    assert order_of(plan)[:, 0].tolist() == [0, 1]


def test_tokens_that_nothing_reads_share_an_expert_that_keeps_no_neuron(paired):
    plan = paired(unread=("mlp",), settings=best, metric="outputs")
    assert plan.constant.tolist() == [False, False, True]
    assert plan.router().macs == 0
    assert plan.shares == pytest.approx([1 / 6, 1 / 6, 2 / 3])


def test_only_tokens_that_are_not_leading_are_clustered(paired, monkeypatch):
    drawn = []

    def clustered(draw, *_, **__):
        drawn.append(draw)
        return np.arange(len(draw.rows)) % 2

    monkeypatch.setattr(planning, "clustered", clustered)
    layer = planted((NORTH, 20, 0), (EAST, 20, 1), (UP, 20, 2), images=10)
    paired(tokens="kinds", layer=layer)
    assert len(drawn[0].rows) == 40
    assert (layer.sample.position[drawn[0].rows] >= 2).all()


@pytest.mark.parametrize("order", ["variance", "obs"])
def test_a_layer_that_gets_leading_tokens_alone_keeps_an_expert_for_others(paired, order):
    layer = planted((NORTH, 10, 0), (EAST, 10, 1), images=10)
    plan = paired(tokens="kinds", layer=layer, order=order)
    assert plan.converted
    assert plan.shares.tolist() == [0.5, 0.5, 0]
    assert plan.scores.neurons.shape == plan.known.means.shape == (3, 6)
    assert np.isfinite(plan.scores.neurons).all()
    assert isinstance(plan.router().inner, ConstantRouter)


def test_a_dense_layer_is_not_converted():
    assert not LayerPlan(SITE, Partition(reason="not asked for")).converted


# All layers of a model


def calibrated(root, config, *, model=None):
    return Calibration(model or toy_vit(), IMAGES, config.resolved(), root)


def plans_of(root, *, model=None, settings=quick, **given):
    return plan_layers(calibrated(root, settings(**given), model=model))


def test_layers_that_are_not_asked_for_stay_dense(tmp_path):
    plans = plans_of(tmp_path, layers=(1,))
    assert [plan.converted for plan in plans] == [False, True, False]
    assert [plan.partition.reason for plan in plans] == ["not asked for", "", "not asked for"]


@pytest.mark.parametrize("layers", [(), (3,), (0, 3)])
def test_layers_that_do_not_exist_are_refused(tmp_path, layers):
    with pytest.raises(MoeeError, match="layers between 0 and 2"):
        plans_of(tmp_path, layers=layers)


KEPT = (
    "partition.labels_of",
    "partition.reduce_dimensions",
    "statistics.ExpertTally.add",
    "scoring.elimination_costs",
)


@pytest.mark.parametrize(("settings", "order"), [(quick, "variance"), (best, "obs")])
def test_clusters_statistics_and_costs_are_found_again_in_the_store(
    tmp_path, monkeypatch, settings, order
):
    given = {"settings": settings, "order": order}
    first = plans_of(tmp_path, **given)
    for name in KEPT:
        monkeypatch.setattr(f"moee_analysis.{name}", lambda *_, **__: pytest.fail("again"))
    for one, other in zip(first, plans_of(tmp_path, macs_reduction=0.1, **given), strict=True):
        for name in ("centres", "root", "rows", "labels"):
            found = (getattr(each.partition, name) for each in (one, other))
            np.testing.assert_array_equal(*found)
        np.testing.assert_array_equal(one.scores.neurons, other.scores.neurons)


def test_every_part_of_a_plan_is_found_again_by_what_decides_it(tmp_path):
    first, *others = (
        plans_of(tmp_path, settings=best, layers=(0,), **changed)[0]
        for changed in ({}, {"order": "obs"}, {"metric": "outputs"}, {})
    )
    assert not np.allclose(first.scores.neurons, others[0].scores.neurons)
    assert not np.allclose(first.scores.weight, others[1].scores.weight)
    for part in ("scores", "known"):
        for name, values in vars(getattr(first, part)).items():
            np.testing.assert_array_equal(values, vars(getattr(others[-1], part))[name])


@pytest.mark.parametrize("changed", [{"metric": "outputs"}, {"seed": 1}, {"layers": (1,)}])
def test_costs_of_elimination_are_kept_by_what_decides_them(tmp_path, changed):
    def costs():
        return {path.name for path in tmp_path.iterdir() if path.name.startswith("costs-")}

    given = {"settings": best, "order": "obs", "layers": (0,)}
    plans_of(tmp_path, **given)
    first = costs()
    plans_of(tmp_path, **given)
    assert costs() == first
    assert len(first) == 1
    plans_of(tmp_path, **given | changed)
    assert len(costs()) == 2


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


def test_where_an_mlp_gets_the_cls_token_alone_the_expert_of_patches_is_empty(tmp_path):
    torch.manual_seed(0)
    model = Cait(
        img_size=32, patch_size=8, embed_dim=32, depth=1, num_heads=2, num_classes=6,
        depth_token_only=1, init_values=1.0,
    )  # fmt: skip
    model.pretrained_cfg = toy_vit().pretrained_cfg
    model.eval().requires_grad_(requires_grad=False)
    last = plans_of(tmp_path, model=model, settings=best)[-1]
    assert (last.site.name, last.tokens) == ("blocks_token_only.0.mlp", 1)
    assert last.shares.tolist() == [1, 0]
    assert last.constant.tolist() == [False, True]
    assert last.known.means.shape == last.scores.neurons.shape == (2, last.site.hidden)


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
    calibration, site = calibrated(tmp_path, config), find_mlps(toy_vit())[0]
    (layers,) = calibration.parts([site], gradients=gradients)
    sample = layers[site.name].sample
    assert isinstance(sample.hidden, np.ndarray) is hidden
    assert (sample.directions is not None) is gradients
