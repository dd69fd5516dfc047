from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.extraction import cross_token_fisher
from moee_analysis.extraction.cross_token_fisher import (
    CoherenceAccumulator,
    scale_by_coherence,
    spread_images,
)
from moee_analysis.extraction.experts.layer_experts import LayerExperts, StatisticsAccumulator
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.fisher import DAMPING
from tests.helpers import layers
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.helpers.runs import best

IMAGES, TOKENS, DIM, HIDDEN = 40, 6, 5, 8
ROWS = IMAGES * TOKENS
IMAGE, POSITION = np.divmod(np.arange(ROWS, dtype=np.int32), TOKENS)
KEPT = np.zeros((3, HIDDEN), dtype=bool)
KEPT[:, ::2] = True
CUTS = (TOKENS, 7 * TOKENS, 30 * TOKENS)  # parts are whole images
RNG = np.random.default_rng(0)
ACTIVE, GRADIENTS = RNG.normal(size=(ROWS, HIDDEN)), RNG.normal(size=(2, ROWS, DIM))


def made_of(hidden, gradients):
    """A layer of such hidden activations (rows, hidden) and gradients (probes, rows, dim)."""
    return layers.layer_of(
        layers.sample_of(
            hidden, inputs=np.zeros((ROWS, DIM), np.float16), position=POSITION, image=IMAGE,
            gradients=gradients.astype(np.float32),
        )
    )  # fmt: skip


LAYER = made_of(ACTIVE, GRADIENTS)
SEVERAL = np.random.default_rng(3).integers(1, 4, size=ROWS).astype(np.float32)
WEIGHTED = replace(LAYER, sample=replace(LAYER.sample, weight=SEVERAL))


def coherence_of(layer, kept=KEPT, *, members=None, images=None):
    """CLS has an expert, the others are dealt to two."""
    members = np.arange(ROWS) % 2 if members is None else members
    assignment = layers.assigned(members, dim=DIM, prefix=(0,))
    counting = StatisticsAccumulator(layer.site, assignment, gradients=True)
    statistics = layers.computed(counting, layer)
    images = spread_images(IMAGES) if images is None else images
    return CoherenceAccumulator(layer.site, assignment, kept, images, statistics)


def measure(layer, *args):
    return layers.computed(coherence_of(layer, *args), layer)


def one_by_one(layer, accumulator):
    """Cost of whole images, and that of their tokens, token by token."""
    W2, g = layer.mlp.fc2.weight.double().numpy(), layer.sample.gradients(np.arange(ROWS))
    _, members = accumulator.assignment.of(layer)
    statistics, together, apart = accumulator.statistics, 0.0, 0.0
    for image in accumulator.images:
        moved = np.zeros(len(g))
        for row in np.flatnonzero((layer.sample.image == image) & (layer.sample.position > 0)):
            expert = members[row]
            if expert < 0:
                continue
            hidden = layer.sample.hidden[row].astype(float) - statistics.means[expert]
            error = -W2 @ (hidden * ~accumulator.kept[expert])
            moved += g[:, row].astype(float) @ error * layer.sample.weight[row]
            apart += error @ statistics.metrics[expert] @ error * layer.sample.weight[row]
        together += np.mean(moved**2) / 2
    return together, apart


@pytest.mark.parametrize("chunk", [7, 50])
@pytest.mark.parametrize("members", [None, np.arange(ROWS) % 3 - 1])  # some count for no expert
def test_coherence_is_the_cost_of_whole_images_over_that_of_their_tokens(
    monkeypatch, chunk, members
):
    monkeypatch.setattr(cross_token_fisher, "CHUNK", chunk)
    accumulator = coherence_of(WEIGHTED, members=members)
    sums = layers.sums_of(accumulator, WEIGHTED)
    together, apart = one_by_one(WEIGHTED, accumulator)
    assert float(sums["together"]) == pytest.approx(together, rel=1e-4)
    assert float(sums["apart"]) == pytest.approx(apart, rel=1e-4)
    assert accumulator.compute(sums) == pytest.approx(together / apart, rel=1e-4)


@pytest.mark.parametrize("cuts", [CUTS, range(TOKENS, ROWS, TOKENS)])
def test_parts_add_up_to_one_pass(cuts):
    accumulator = coherence_of(WEIGHTED, images=np.array([0, 1, 5, 22, 39]))
    whole = layers.sums_of(accumulator, WEIGHTED)
    layers.agree(layers.added_up(accumulator, layers.parts_of(WEIGHTED, cuts)), whole)
    together, _ = one_by_one(WEIGHTED, accumulator)
    assert float(whole["together"]) == pytest.approx(together, rel=1e-4)
    some = coherence_of(WEIGHTED, images=np.array([0, 39]))
    assert not any(layers.sums_of(some, layers.part_of(WEIGHTED, TOKENS, 9 * TOKENS)).values())


def test_errors_that_agree_cost_as_many_times_more_as_there_are_tokens():
    assert measure(LAYER) == pytest.approx(1 / (1 + DAMPING), rel=0.2)
    found = measure(made_of(ACTIVE[IMAGE], GRADIENTS[:, IMAGE]))
    assert found == pytest.approx((TOKENS - 1) / (1 + DAMPING), rel=0.25)


def test_where_nothing_is_lost_or_read_there_is_nothing_to_cohere():
    assert measure(LAYER, np.ones_like(KEPT)) == 1
    assert measure(made_of(ACTIVE, 0 * GRADIENTS)) == 1


@pytest.mark.parametrize("images", [1, 2, 399, 400, 401, 555, 2000, 50_000])
def test_of_many_images_some_are_looked_at_from_all_over(images):
    found = spread_images(images)
    assert len(found) == len(set(found)) == min(images, cross_token_fisher.IMAGES)
    assert (found[0], found[-1]) == (0, images - 1)
    gaps = np.diff(found)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_scores_of_routed_experts_are_scaled_and_those_of_other_layers_left_alone(tmp_path):
    accumulator, scores = coherence_of(LAYER), np.random.default_rng(0).random((3, HIDDEN))
    routed = LayerExperts(
        LAYER.site, TOKENS, (0,), partition=accumulator.assignment.partition,
        statistics=accumulator.statistics,
    )  # fmt: skip
    constant = replace(routed, site=replace(LAYER.site, name="constant"), unread=True)
    found = scale_by_coherence(
        layers.Made([LAYER], tmp_path, CUTS), [routed, constant],
        {"mlp": scores, "constant": scores}, {"mlp": KEPT, "constant": KEPT},
    )  # fmt: skip
    np.testing.assert_array_equal(found["mlp"][0], scores[0])
    np.testing.assert_allclose(found["mlp"][1:], measure(LAYER) * scores[1:], rtol=1e-6)
    np.testing.assert_array_equal(found["constant"], scores)


def test_measured_coherence_moves_neurons_between_layers():
    one, other = (
        [layer.active_fraction for layer in run.layers]
        for run in (
            extract(toy_vit(), toy_images(8), best(macs_reduction=0.25, coherence=piece))
            for piece in ("ignored", "measured")
        )
    )
    assert one != other
    assert sum(one) == pytest.approx(sum(other), abs=0.05)
