from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis import coherence as measured
from moee_analysis.coherence import coherence, cohering
from moee_analysis.extraction import extract
from moee_analysis.fisher import DAMPING, expert_metrics
from moee_analysis.models import MlpSite
from moee_analysis.partition import one_expert
from moee_analysis.planning import LayerPlan, plan_layers
from moee_analysis.recorded import Recorded
from moee_analysis.scoring import score
from tests.makers import best, sample_of
from tests.toys import toy_images, toy_vit

IMAGES, TOKENS, DIM, HIDDEN = 40, 6, 5, 8
ROWS = IMAGES * TOKENS
SITE = MlpSite("mlp", 0, DIM, HIDDEN)
KEPT = np.zeros((3, HIDDEN), dtype=bool)
KEPT[:, ::2] = True


def layer_of(hidden, gradients):
    """A layer of such hidden activations (rows, hidden) and gradients (probes, rows, dim)."""
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN).requires_grad_(requires_grad=False)
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), TOKENS)
    sample = sample_of(hidden, position=position, gradients=gradients.astype(np.float32))
    return Recorded(SITE, mlp, replace(sample, image=image), "made")


def planned(layer, *, experts=2):
    """CLS has an expert, the others are dealt to so many."""
    routed = np.arange(ROWS) % experts
    position = layer.sample.position
    members = np.where(position == 0, 0, 1 + routed)
    plan = LayerPlan(SITE, replace(one_expert(0), centres=np.zeros((experts, DIM))), (0,), TOKENS)
    kinds = plan.kinds(layer)
    scores = score(layer.mlp, layer.sample, members, kinds, order="variance", metric="fisher")
    return replace(plan, members=members, constant=np.zeros(3, dtype=bool), scores=scores)


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(ROWS, HIDDEN)), rng.normal(size=(2, ROWS, DIM))


def one_by_one(layer, plan, kept):
    """Cost of whole images over that of their tokens, token by token."""
    metrics = expert_metrics(layer.sample, plan.members, plan.kinds(layer))
    W2, g = layer.mlp.fc2.weight.double().numpy(), layer.sample.gradients(np.arange(ROWS))
    together = apart = 0.0
    for image in range(IMAGES):
        moved = np.zeros(len(g))
        for row in np.flatnonzero((layer.sample.image == image) & (layer.sample.position > 0)):
            expert = plan.members[row]
            hidden = layer.sample.hidden[row].astype(float) - plan.scores.means[expert]
            error = -W2 @ (hidden * ~kept[expert])
            moved += g[:, row].astype(float) @ error
            apart += error @ metrics[expert].numpy() @ error
        together += np.mean(moved**2) / 2
    return together / apart


@pytest.mark.parametrize("chunk", [7, 50])
def test_coherence_is_what_whole_images_cost_over_what_their_tokens_do(monkeypatch, chunk):
    monkeypatch.setattr(measured, "CHUNK", chunk)
    layer = layer_of(*drawn())
    plan = planned(layer)
    assert coherence(layer, plan, KEPT) == pytest.approx(one_by_one(layer, plan, KEPT), rel=1e-4)


def test_errors_that_have_nothing_in_common_cost_what_they_cost_alone():
    layer = layer_of(*drawn())
    assert coherence(layer, planned(layer), KEPT) == pytest.approx(1 / (1 + DAMPING), rel=0.2)


def test_errors_that_agree_cost_as_many_times_more_as_there_are_tokens():
    hidden, gradients = drawn()
    image = np.arange(ROWS) // TOKENS
    layer = layer_of(hidden[image], gradients[:, image])
    found = coherence(layer, planned(layer), KEPT)
    assert found == pytest.approx((TOKENS - 1) / (1 + DAMPING), rel=0.25)


def test_where_nothing_is_lost_there_is_nothing_to_cohere():
    layer = layer_of(*drawn())
    assert coherence(layer, planned(layer), np.ones_like(KEPT)) == 1


def test_where_nothing_is_read_there_is_nothing_to_cohere():
    hidden, gradients = drawn()
    layer = layer_of(hidden, 0 * gradients)
    assert coherence(layer, planned(layer), KEPT) == 1


# A model


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    root, images, config = tmp_path_factory.mktemp("store"), toy_images(10), best().resolved()
    model = toy_vit()
    plans = plan_layers(model, images, replace(config, layers=(1, 2)), root=root)
    kept = {p.site.name: p.scores.neurons > np.median(p.scores.neurons) for p in plans[1:]}
    return plans, cohering(model, images, plans, kept, config, root=root)


def test_scores_of_routed_experts_are_multiplied_by_what_a_layer_s_errors_share(sized):
    before, after = (plans[1].scores for plans in sized)
    factors = after.neurons / before.neurons
    np.testing.assert_allclose(factors[0], 1)
    np.testing.assert_allclose(factors[1:], factors[1, 0])
    assert factors[1, 0] > 0
    assert factors[1, 0] != 1
    np.testing.assert_array_equal(after.means, before.means)
    assert [plans[1].coherence for plans in sized] == [1, pytest.approx(factors[1, 0])]


def test_a_layer_that_is_dense_or_has_a_constant_expert_is_left_alone(sized):
    before, after = sized
    assert after[0] is before[0]
    assert after[2] is before[2]


def test_measured_coherence_moves_neurons_between_layers():
    runs = [
        extract(toy_vit(), toy_images(10), best(macs_reduction=0.25, coherence=piece))
        for piece in ("ignored", "measured")
    ]
    one, other = ([layer.active_fraction for layer in run.layers] for run in runs)
    assert one != other
    assert sum(one) == pytest.approx(sum(other), abs=0.05)
