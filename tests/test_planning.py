from __future__ import annotations

import numpy as np
import pytest

from moee_analysis import planning
from moee_analysis.activations import LayerSample
from moee_analysis.clustering import NOISE, Clusters
from moee_analysis.errors import MoeeError
from moee_analysis.models import MlpSite
from moee_analysis.planning import plan_layer, plan_layers, plan_static
from moee_analysis.routers import ConstantRouter, CosineRouter
from tests.makers import quick
from tests.toys import toy_images, toy_vit

DIM, HIDDEN = 4, 6
SITE = MlpSite("blocks.0.mlp", 0, DIM, HIDDEN)
NORTH, EAST, UP = np.eye(DIM)[:3]


def sample_of(*groups, spread=0.05, seed=0):
    """Tokens around directions: (direction, count, neuron that varies in this group)."""
    rng = np.random.default_rng(seed)
    inputs, hidden = [], []
    for direction, count, neuron in groups:
        inputs.append(direction + spread * rng.normal(size=(count, DIM)))
        quiet = 0.01 * rng.normal(size=(count, HIDDEN))
        quiet[:, neuron] = rng.normal(size=count)
        hidden.append(quiet)
    total = sum(count for _, count, _ in groups)
    return LayerSample(
        np.concatenate(inputs).astype(np.float16),
        np.concatenate(hidden).astype(np.float16),
        np.arange(total, dtype=np.int32),
        np.zeros(total, dtype=np.int32),
        np.ones(total, dtype=np.float32),
    )


# 40 tokens to the north that vary in neuron 0, 20 to the east in neuron 1; and 30 tokens of noise
# near the north whose activations vary in neuron 2.
PLANTED = sample_of((NORTH, 40, 0), (EAST, 20, 1), (NORTH + 0.2 * UP, 30, 2))
LABELS = np.repeat([0, 1, NOISE], [40, 20, 30])
ROWS = np.arange(90)


def planned(noise, *, sample=PLANTED, labels=LABELS, rows=ROWS):
    return plan_layer(SITE, sample, rows, Clusters(labels), noise=noise)


def test_experts_start_at_the_mean_inputs_of_their_clusters():
    plan = planned("drop")
    inputs = PLANTED.inputs.astype(np.float32)
    np.testing.assert_allclose(plan.centres[0], inputs[:40].mean(axis=0), atol=1e-6)
    np.testing.assert_allclose(plan.centres[1], inputs[40:60].mean(axis=0), atol=1e-6)
    assert isinstance(plan.router(), CosineRouter)
    assert plan.noise_share == pytest.approx(30 / 90)
    assert plan.converted


def test_noise_rerouted_counts_for_the_expert_it_is_routed_to():
    plan = planned("reroute")
    assert plan.statistics.weight.tolist() == [70, 20]
    assert set(plan.ranking.order[0, :2]) == {0, 2}


def test_noise_dropped_counts_for_no_statistics_but_is_still_routed():
    plan = planned("drop")
    assert plan.statistics.weight.tolist() == [40, 20]
    assert plan.ranking.order[:, 0].tolist() == [0, 1]
    np.testing.assert_allclose(plan.shares, [70 / 90, 20 / 90])


def test_noise_as_the_rest_gets_an_expert_of_its_own():
    plan = planned("rest")
    assert len(plan.centres) == 3
    assert plan.ranking.order[:, 0].tolist() == [0, 1, 2]
    np.testing.assert_allclose(plan.shares.sum(), 1)
    rest = PLANTED.inputs[60:].astype(np.float32).mean(axis=0)
    np.testing.assert_allclose(plan.centres[2], rest, atol=1e-6)


def test_without_noise_the_rest_is_no_expert():
    labels = np.repeat([0, 1], [40, 50])
    assert len(planned("rest", labels=labels).centres) == 2


@pytest.mark.parametrize("noise", ["reroute", "drop", "rest"])
def test_an_expert_that_no_token_is_routed_to_is_left_out(noise):
    # The third cluster lies half to the north and half to the east: its mean is nobody's nearest.
    sample = sample_of((NORTH, 40, 0), (EAST, 40, 1), (NORTH, 10, 2), (EAST, 10, 2), spread=0)
    labels = np.repeat([0, 2, 1], [40, 40, 20])
    plan = planned(noise, sample=sample, labels=labels, rows=np.arange(100))
    assert len(plan.centres) == len(plan.shares) == 2
    np.testing.assert_allclose(plan.shares, [0.5, 0.5])
    np.testing.assert_allclose(plan.centres @ np.stack([NORTH, EAST]).T, np.eye(2), atol=1e-3)
    assert plan.route_agreement == 1.0


def test_a_layer_that_routes_everything_to_one_expert_stays_dense():
    sample = sample_of((NORTH, 40, 0), (2 * NORTH, 40, 1), spread=0)
    labels = np.repeat([0, 1], 40)
    plan = planned("reroute", sample=sample, labels=labels, rows=np.arange(80))
    assert not plan.converted
    assert plan.reason == "all tokens route to one expert"


def test_only_some_rows_need_to_be_clustered():
    rows = np.arange(0, 90, 2)
    plan = planned("reroute", labels=LABELS[rows], rows=rows)
    assert plan.statistics.weight.sum() == 90
    assert planned("drop", labels=LABELS[rows], rows=rows).statistics.weight.tolist() == [20, 10]


def test_route_agreement_is_the_share_of_members_that_come_back():
    inputs = PLANTED.inputs.astype(float)
    labels = LABELS.copy()
    labels[:4] = 1  # four tokens to the north that the activations put with the east
    plan = planned("drop", labels=labels)
    nearest = [
        np.argmax(plan.centres @ x / np.linalg.norm(plan.centres, axis=1)) for x in inputs[:60]
    ]
    assert plan.route_agreement == pytest.approx(np.mean(nearest == labels[:60]))
    assert plan.route_agreement < 1


def test_a_layer_without_clusters_keeps_its_reason():
    plan = plan_layer(SITE, PLANTED, ROWS, Clusters(LABELS, "1 clusters found"), noise="drop")
    assert not plan.converted
    assert plan.reason == "1 clusters found"
    assert plan.noise_share == pytest.approx(30 / 90)


def test_one_expert_ranks_neurons_by_their_variance_over_all_tokens():
    plan = plan_static(SITE, PLANTED)
    variance = PLANTED.hidden.astype(float).var(axis=0)
    assert plan.ranking.order[0].tolist() == np.argsort(-variance).tolist()
    assert isinstance(plan.router(), ConstantRouter)
    assert plan.macs_per_token(1.0) == 2 * DIM * HIDDEN


def test_a_token_costs_its_router_and_its_share_of_the_experts():
    plan = planned("drop")
    sizes = plan.ranking.sizes(0.9)
    assert plan.macs_per_token(0.9) == pytest.approx(2 * DIM + 2 * DIM * (plan.shares @ sizes))


def plans_of(root, **settings):
    return plan_layers(toy_vit(), toy_images(), quick(**settings).resolved(), root=root)


def test_layers_that_are_not_asked_for_stay_dense(tmp_path):
    plans = plans_of(tmp_path, layers=(1,))
    assert [plan.converted for plan in plans] == [False, True, False]
    assert [plan.reason for plan in plans] == ["not asked for", "", "not asked for"]


@pytest.mark.parametrize("layers", [(), (3,), (-1, 0)])
def test_layers_that_do_not_exist_are_refused(tmp_path, layers):
    with pytest.raises(MoeeError, match="layers between 0 and 2"):
        plans_of(tmp_path, layers=layers)


def test_clusters_are_found_again_in_the_store(tmp_path, monkeypatch):
    first = plans_of(tmp_path)
    monkeypatch.setattr(planning, "density_labels", lambda *_, **__: pytest.fail("again"))
    monkeypatch.setattr(planning, "reduce_dimensions", lambda *_, **__: pytest.fail("again"))
    for one, other in zip(first, plans_of(tmp_path, variance_kept=0.5), strict=True):
        np.testing.assert_array_equal(one.centres, other.centres)
