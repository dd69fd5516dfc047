from functools import partial

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction import pipeline
from moee_analysis.extraction.experts.neuron_scores import score_neurons
from moee_analysis.extraction.pipeline import group_tokens
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter, TokenKindRouter
from tests.helpers.images import toy_images
from tests.helpers.layers import EAST, LABELS, NORTH, PLANTED, UP, Made, planted
from tests.helpers.models import toy_swin, toy_vit
from tests.helpers.runs import best, quick

IMAGES = toy_images(8)


@pytest.fixture
def grouped(tmp_path, monkeypatch):
    """Group the tokens of a made-up layer, by clusters that may be known; score its neurons."""

    def group(labels=None, *, layer=PLANTED, cuts=(30, 50), kinds=(), settings=quick, **given):
        if labels is not None:
            monkeypatch.setattr(pipeline, "cluster_tokens", lambda *_, **__: labels)
        monkeypatch.setattr(pipeline, "unread_patches", lambda _: frozenset())
        made, config = Made([layer], tmp_path, cuts, kinds=kinds), settings(**given).resolved()
        (found,) = group_tokens(made, config)
        scores = score_neurons(made, [found], order=config.order, metric=config.metric)
        return found, scores.get("mlp")

    return group


def best_neurons(scores):
    return np.argsort(-scores, axis=1, kind="stable")


# One layer


def test_noise_rerouted_counts_for_the_expert_it_is_routed_to(grouped):
    found, scores = grouped(LABELS, noise="reroute")
    assert found.statistics.weight.tolist() == found.statistics.routed.tolist() == [70, 20]
    np.testing.assert_allclose(found.statistics.shares, [70 / 90, 20 / 90])
    assert set(best_neurons(scores)[0, :2]) == {0, 2}
    assert found.converted
    assert isinstance(found.router(), CosineRouter)
    np.testing.assert_array_equal(found.router().centres, found.partition.centres)


def test_noise_dropped_is_still_routed_and_as_the_rest_has_an_expert(grouped):
    found, scores = grouped(LABELS, noise="drop")
    assert found.assignment.of(PLANTED)[1].tolist() == LABELS.tolist()
    assert best_neurons(scores)[:, 0].tolist() == [0, 1]
    assert found.statistics.weight.tolist() == [40, 20]
    np.testing.assert_allclose(found.statistics.shares, [70 / 90, 20 / 90])
    rest, scores = grouped(LABELS, noise="rest")
    assert best_neurons(scores)[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(rest.statistics.shares.sum(), 1)


def test_a_layer_without_clusters_keeps_its_reason(grouped):
    found, scores = grouped(np.minimum(LABELS, 0))
    assert not found.converted
    assert found.partition.reason == "1 clusters found"
    assert found.partition.noise_share == pytest.approx(30 / 90)
    assert found.statistics is scores is None


BETWEEN = planted((NORTH, 40, 0), (EAST, 40, 1), (NORTH, 10, 2), (EAST, 10, 2), spread=0)


@pytest.mark.parametrize("order", ["variance", "obs"])
@pytest.mark.parametrize("noise", ["reroute", "drop", "rest"])
def test_an_expert_that_no_token_is_routed_to_is_left_out_of_everything(grouped, noise, order):
    labels = np.repeat([0, 2, 1], [40, 40, 20])  # the mean of the last is nobody's nearest
    found, scores = grouped(labels, layer=BETWEEN, noise=noise, order=order)
    assert found.partition.experts == found.assignment.experts == 2
    assert found.statistics.routed.tolist() == [50, 50]
    assert found.statistics.weight.tolist() == ([50, 50] if noise == "reroute" else [40, 40])
    assert scores.shape == (2, 6)
    routed, members = found.assignment.of(BETWEEN)
    assert np.bincount(routed).tolist() == [50, 50]
    assert np.bincount(members[members >= 0]).tolist() == found.statistics.weight.tolist()
    if noise != "reroute":
        assert best_neurons(scores)[:, 0].tolist() == [0, 1]


def test_a_layer_that_routes_everything_to_one_expert_stays_dense(grouped):
    layer = planted((NORTH, 40, 0), (2 * NORTH, 40, 1), spread=0)
    found, _ = grouped(np.repeat([0, 1], 40), layer=layer)
    assert found.partition.reason == "all tokens route to one expert"
    assert not found.converted


# Leading tokens, and tokens that nothing reads

PAIRED = planted((NORTH, 20, 0), (EAST, 40, 1), images=10)  # 6 tokens, the first 2 to the north


@pytest.fixture
def paired(grouped):
    """Group the tokens of a layer of two leading tokens and four others."""
    return partial(grouped, layer=PAIRED, cuts=(6, 42), kinds=("cls", "dist"))


def test_leading_tokens_have_experts_before_those_of_the_others(paired):
    found, _ = paired(settings=best, metric="outputs")
    _, members = found.assignment.of(PAIRED)
    position = PAIRED.sample.position
    assert (members[position == 0] == 0).all()
    assert (members[position == 1] == 1).all()
    assert members[position > 1].min() == 2
    np.testing.assert_allclose(found.statistics.shares[:2], 1 / 6)
    assert found.tokens == 6
    router = found.router()
    assert isinstance(router, TokenKindRouter)
    images = torch.zeros(10, 6, 4)
    images[PAIRED.sample.image, position] = torch.from_numpy(PAIRED.sample.inputs).float()
    chosen = router(images).reshape(10, 6)
    np.testing.assert_array_equal(chosen[PAIRED.sample.image, position], members)


def test_leading_tokens_of_one_kind_share_an_expert(paired):
    found, scores = paired(kinds=("register", "register"), tokens="kinds", experts="one")
    assert found.statistics.shares == pytest.approx([1 / 3, 2 / 3])
    assert best_neurons(scores)[:, 0].tolist() == [0, 1]


def test_only_tokens_that_are_not_leading_are_clustered(paired, monkeypatch):
    samples = []

    def label(sample, *_, **__):
        samples.append(sample)
        return np.arange(len(sample.rows)) % 2

    monkeypatch.setattr(pipeline, "cluster_tokens", label)
    layer = planted((NORTH, 20, 0), (EAST, 20, 1), (UP, 20, 2), images=10)
    paired(tokens="kinds", layer=layer)
    assert len(samples[0].rows) == 40
    assert (layer.sample.position[samples[0].rows] >= 2).all()


@pytest.mark.parametrize("order", ["variance", "obs"])
def test_a_layer_that_gets_leading_tokens_alone_keeps_an_expert_for_others(paired, order):
    layer = planted((NORTH, 10, 0), (EAST, 10, 1), images=10)
    found, scores = paired(tokens="kinds", layer=layer, order=order)
    assert found.converted
    assert found.statistics.shares.tolist() == [0.5, 0.5, 0]
    assert scores.shape == found.statistics.means.shape == (3, 6)
    assert np.isfinite(scores).all()
    assert isinstance(found.router().inner, ConstantRouter)


# All layers of a model


def groups_of(root, *, build=toy_vit, settings=quick, **given):
    config = settings(cluster_tokens=100, **given).resolved()
    tokens = calibration_tokens(build(), IMAGES, config, root=root)
    layers = group_tokens(tokens, config)
    return layers, score_neurons(tokens, layers, order=config.order, metric=config.metric)


@pytest.mark.parametrize("layers", [(), (3,), (0, 3)])
def test_layers_that_do_not_exist_are_refused(tmp_path, layers):
    with pytest.raises(MoeeError, match="layers between 0 and 2"):
        groups_of(tmp_path, layers=layers)


AGAIN = (
    "cluster.clusters_to_router.label", "cluster.clusters_to_router.reduce_dimensions",
    "experts.layer_experts.StatisticsAccumulator.update",
    "experts.neuron_scores.elimination_costs",
)  # fmt: skip


@pytest.mark.parametrize(("settings", "order"), [(quick, "variance"), (best, "obs")])
def test_clusters_statistics_and_costs_are_found_again_in_the_store(
    tmp_path, monkeypatch, settings, order
):
    given = {"settings": settings, "order": order}
    first, scores = groups_of(tmp_path, **given)
    fail = lambda *_, **__: pytest.fail("again")  # noqa: E731
    for name in AGAIN:
        monkeypatch.setattr(f"moee_analysis.extraction.{name}", fail)
    again, found = groups_of(tmp_path, macs_reduction=0.1, **given)
    for one, other in zip(first, again, strict=True):
        for name in ("centres", "root", "rows", "labels"):
            pair = (getattr(each.partition, name) for each in (one, other))
            np.testing.assert_array_equal(*pair)
        np.testing.assert_array_equal(scores[one.site.name], found[one.site.name])


def test_scores_and_statistics_are_kept_by_what_decides_them(tmp_path):
    given = {"settings": best, "layers": (0,), "order": "obs"}
    changes = [{}, {"metric": "outputs"}, {"seed": 1}, {"layers": (1,)}, {"order": "weighted"}, {}]
    found = [groups_of(tmp_path, **given | changed) for changed in changes]
    costs = [path for path in tmp_path.iterdir() if path.name.startswith("costs-")]
    assert len(costs) == 4
    scores = [own["blocks.0.mlp"] for layers, own in found if layers[0].converted]
    assert not any(scores[0].shape == s.shape and np.allclose(scores[0], s) for s in scores[1:-1])
    np.testing.assert_array_equal(scores[0], scores[-1])
    for name, values in vars(found[0][0][0].statistics).items():
        np.testing.assert_array_equal(values, getattr(found[-1][0][0].statistics, name))


def test_cls_has_an_expert_and_the_last_layer_a_constant_one(tmp_path):
    layers, _ = groups_of(tmp_path, settings=best)
    assert [layer.prefix for layer in layers] == 3 * [(0,)]
    assert [layer.constant.any() for layer in layers] == [False, False, True]
    assert all(layer.statistics.shares[0] == pytest.approx(1 / 17) for layer in layers)
    assert layers[2].constant.tolist() == [False, True]
    assert all(isinstance(layer.router().inner, NearestRouter) for layer in layers[:2])
    assert layers[2].router().macs == 0
    layers, _ = groups_of(tmp_path, settings=best, tokens="alike")
    assert [layer.prefix for layer in layers] == [(), (), (0,)]
    layers, _ = groups_of(tmp_path, settings=best, tokens="alike", unread="routed")
    assert [layer.prefix for layer in layers] == [(), (), ()]


def test_a_model_of_patches_alone_has_nothing_but_routed_tokens(tmp_path):
    for layer in groups_of(tmp_path, build=toy_swin, settings=best)[0]:
        assert layer.prefix == ()
        assert not layer.constant.any()
        assert isinstance(layer.router(), NearestRouter)
