from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction import cross_token_fisher as measured
from moee_analysis.extraction.cross_token_fisher import (
    CoherenceTally,
    coherence,
    cohering,
    looked_at,
)
from moee_analysis.extraction.experts.expert_statistics import ExpertTally, statistics_of
from moee_analysis.extraction.experts.neuron_scores import score
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.plan import LayerPlan, plan_layers
from moee_analysis.extraction.record.accumulate import summed_alone
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.fisher import DAMPING
from tests.helpers.makers import best, sample_of
from tests.helpers.planted import Made, added_up, agree, assigned, layer_of, part_of, parts_of
from tests.helpers.toys import toy_images, toy_vit

IMAGES, TOKENS, DIM, HIDDEN = 40, 6, 5, 8
ROWS = IMAGES * TOKENS
KEPT = np.zeros((3, HIDDEN), dtype=bool)
KEPT[:, ::2] = True
CUTS = (TOKENS, 7 * TOKENS, 30 * TOKENS)  # parts are whole images


def made_of(hidden, gradients):
    """A layer of such hidden activations (rows, hidden) and gradients (probes, rows, dim)."""
    image, position = np.divmod(np.arange(ROWS, dtype=np.int32), TOKENS)
    return layer_of(
        sample_of(
            hidden,
            inputs=np.zeros((ROWS, DIM), np.float16),
            position=position,
            image=image,
            gradients=gradients.astype(np.float32),
        )
    )


def tally_of(layer, kept=KEPT, *, members=None, images=None):
    """CLS has an expert, the others are dealt to two."""
    members = np.arange(ROWS) % 2 if members is None else members
    assignment = assigned(members, dim=DIM, prefix=(0,))
    known = ExpertTally(layer.site, assignment, gradients=True)
    known = statistics_of(known, summed_alone(known, layer))
    images = looked_at(IMAGES) if images is None else images
    return CoherenceTally(layer.site, assignment, known, kept, images)


def measure(layer, *args, **given):
    return coherence(summed_alone(tally_of(layer, *args, **given), layer))


def drawn(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(ROWS, HIDDEN)), rng.normal(size=(2, ROWS, DIM))


def one_by_one(layer, tally):
    """Cost of whole images, and that of their tokens, token by token."""
    W2, g = layer.mlp.fc2.weight.double().numpy(), layer.sample.gradients(np.arange(ROWS))
    _, members = tally.assignment.of(layer)
    together = apart = 0.0
    for image in tally.images:
        moved = np.zeros(len(g))
        for row in np.flatnonzero((layer.sample.image == image) & (layer.sample.position > 0)):
            expert = members[row]
            if expert < 0:
                continue
            hidden = layer.sample.hidden[row].astype(float) - tally.known.means[expert]
            error = -W2 @ (hidden * ~tally.kept[expert])
            moved += g[:, row].astype(float) @ error * layer.sample.weight[row]
            apart += error @ tally.known.metrics[expert] @ error * layer.sample.weight[row]
        together += np.mean(moved**2) / 2
    return together, apart


def weighted(layer):
    """The same with tokens that stand for several."""
    weight = np.random.default_rng(3).integers(1, 4, size=ROWS).astype(np.float32)
    return replace(layer, sample=replace(layer.sample, weight=weight))


@pytest.mark.parametrize("chunk", [7, 50])
@pytest.mark.parametrize("lone", [False, True])
def test_coherence_is_what_whole_images_cost_over_what_their_tokens_do(monkeypatch, chunk, lone):
    monkeypatch.setattr(measured, "CHUNK", chunk)
    layer = weighted(made_of(*drawn()))
    members = np.arange(ROWS) % 3 - 1 if lone else None  # some tokens count for no expert
    tally = tally_of(layer, members=members)
    sums, (together, apart) = summed_alone(tally, layer), one_by_one(layer, tally)
    assert float(sums["together"]) == pytest.approx(together, rel=1e-4)
    assert float(sums["apart"]) == pytest.approx(apart, rel=1e-4)
    assert coherence(sums) == pytest.approx(together / apart, rel=1e-4)


@pytest.mark.parametrize("cuts", [CUTS, range(TOKENS, ROWS, TOKENS)])
def test_parts_add_up_to_one_pass(cuts):
    layer = weighted(made_of(*drawn()))
    tally = tally_of(layer, images=np.array([0, 1, 5, 22, 39]))
    whole = summed_alone(tally, layer)
    agree(added_up(tally, parts_of(layer, cuts)), whole)
    assert float(whole["together"]) == pytest.approx(one_by_one(layer, tally)[0], rel=1e-4)


def test_a_part_without_images_to_look_at_adds_nothing():
    layer = made_of(*drawn())
    tally = tally_of(layer, images=np.array([0, 39]))
    assert not any(summed_alone(tally, part_of(layer, TOKENS, 9 * TOKENS)).values())


def test_errors_that_have_nothing_in_common_cost_what_they_cost_alone():
    assert measure(made_of(*drawn())) == pytest.approx(1 / (1 + DAMPING), rel=0.2)


def test_errors_that_agree_cost_as_many_times_more_as_there_are_tokens():
    hidden, gradients = drawn()
    image = np.arange(ROWS) // TOKENS
    found = measure(made_of(hidden[image], gradients[:, image]))
    assert found == pytest.approx((TOKENS - 1) / (1 + DAMPING), rel=0.25)


def test_where_nothing_is_lost_there_is_nothing_to_cohere():
    assert measure(made_of(*drawn()), np.ones_like(KEPT)) == 1


def test_where_nothing_is_read_there_is_nothing_to_cohere():
    hidden, gradients = drawn()
    assert measure(made_of(hidden, 0 * gradients)) == 1


# Which images


@pytest.mark.parametrize("images", [1, 2, 399, 400])
def test_few_images_are_all_looked_at(images):
    assert looked_at(images).tolist() == list(range(images))


@pytest.mark.parametrize("images", [401, 555, 2000, 50_000])
def test_of_many_images_some_are_looked_at_from_all_over(images):
    found = looked_at(images)
    assert len(found) == len(set(found)) == measured.IMAGES
    assert (found[0], found[-1]) == (0, images - 1)
    gaps = np.diff(found)
    assert gaps.max() - gaps.min() <= 1


# Plans


def planned(layer):
    tally = tally_of(layer)
    scores = score(layer.mlp, tally.known, order="variance")
    found, known = tally.assignment, tally.known
    return LayerPlan(layer.site, found.partition, found.prefix, TOKENS, known=known, scores=scores)


def test_plans_are_scaled_by_what_is_measured_in_parts(tmp_path):
    layer = made_of(*drawn())
    made, plan = Made([layer], tmp_path, best().resolved(), CUTS), planned(layer)
    (found,) = cohering(made, [plan], {"mlp": KEPT})
    factor = measure(layer)
    assert found.coherence == pytest.approx(factor, rel=1e-6)
    np.testing.assert_array_equal(found.scores.neurons[0], plan.scores.neurons[0])
    np.testing.assert_allclose(found.scores.neurons[1:], factor * plan.scores.neurons[1:])


# A model


@pytest.fixture(scope="module")
def sized(tmp_path_factory):
    root, config = tmp_path_factory.mktemp("store"), best(layers=(1, 2)).resolved()
    calibration = Calibration(toy_vit(), toy_images(10), config, root)
    plans = plan_layers(calibration)
    kept = {p.site.name: p.scores.neurons > np.median(p.scores.neurons) for p in plans[1:]}
    return plans, cohering(calibration, plans, kept)


def test_scores_of_routed_experts_are_multiplied_by_what_a_layer_s_errors_share(sized):
    before, after = (plans[1].scores for plans in sized)
    factors = after.neurons / before.neurons
    np.testing.assert_allclose(factors[0], 1)
    np.testing.assert_allclose(factors[1:], factors[1, 0])
    assert factors[1, 0] > 0
    assert factors[1, 0] != 1
    np.testing.assert_array_equal(after.weight, before.weight)
    assert sized[0][1].known is sized[1][1].known
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
