from dataclasses import replace

import numpy as np
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.budget import Budget, find_share, keep_share
from moee_analysis.extraction.experts.neuron_scores import score_neurons
from moee_analysis.extraction.pipeline import extract, group_tokens
from moee_analysis.extraction.record.token_source import calibration_tokens
from moee_analysis.measure import macs
from moee_analysis.models.macs import count, count_parameters
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_swin, toy_vit
from tests.helpers.runs import CLUSTERING, best, quick

IMAGES = toy_images(8)
NOTHING = {"clustering": replace(CLUSTERING, max_noise=0.001)}  # no layer has clusters
CLOSE = 0.003  # of the dense model's
VARIANCE = np.random.default_rng(0).gamma(0.5, size=(4, 30))
SHARES = [0.05, 0.3, 0.5, 0.9, 0.99, 1.0]

# A share of the scores


def smallest_set(variance, p):
    """Neurons taken one at a time, the most variable first, until they hold a share p."""
    left = sorted(range(len(variance)), key=lambda i: (-variance[i], i))
    taken = [left.pop(0)]
    while left and sum(variance[taken]) < p * sum(variance) - 1e-9:
        taken.append(left.pop(0))
    return sorted(taken)


@pytest.mark.parametrize("p", SHARES)
def test_an_expert_keeps_the_fewest_neurons_that_hold_its_share_of_variance(p):
    kept = keep_share(VARIANCE, p)
    assert [np.flatnonzero(row).tolist() for row in kept] == [smallest_set(v, p) for v in VARIANCE]
    assert (kept <= keep_share(VARIANCE, p + 0.03)).all()


def test_the_ends_of_a_share():
    variance = VARIANCE.copy()
    variance[:, 5:] = 0  # neurons that never change are kept for the whole variance alone
    assert keep_share(variance, 1.0).all()
    assert keep_share(variance, 0.999).sum(axis=1).max() <= 5
    assert keep_share(VARIANCE, 0.0).sum(axis=1).tolist() == [1] * 4
    assert keep_share(np.array([[1.0, 2, 1, 1]]), 0.7).tolist() == [[True, True, True, False]]
    assert keep_share(np.zeros((2, 6)), 0.9).all()


def cost(p):
    return 100 + 10 * int(keep_share(VARIANCE, p).sum())


@pytest.mark.parametrize("reduction", [0.1, 0.28, 0.6, 0.8])
def test_bisection_finds_the_largest_share_within_the_budget(reduction):
    budget = (1 - reduction) * cost(1.0)
    p = find_share(cost, dense=cost(1.0), reduction=reduction)
    affordable = [q for q in np.linspace(0, 1, 1001) if cost(q) <= budget]
    assert cost(p) <= budget < cost(p + 1e-9)
    assert p >= max(affordable) - 1e-12
    assert find_share(cost, dense=2 * cost(1.0), reduction=0.4) == 1.0


# Budgets of whole runs


def extracted(store, build=toy_vit, settings=best, **pieces):
    return extract(build(), IMAGES, settings(**pieces), store=store)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


MACS, PARAMETERS = "macs_reduction", "params_reduction"


@pytest.mark.parametrize(("build", "pieces"), [
    (toy_vit, {MACS: 0.15}), (toy_vit, {MACS: 0.3}),
    (toy_swin, {MACS: 0.3}), (lively, {MACS: 0.25}),
    (toy_vit, {MACS: 0.2, "experts": "one"}), (toy_vit, {MACS: 0.2, "router": "cosine"}),
    (toy_vit, {MACS: 0.2, "layers": (0, 2)}),
    (toy_vit, {MACS: 0.2, "settings": quick, "budget": "global"}),
    (toy_vit, {PARAMETERS: 0.2, "refit": "none"}), (toy_vit, {PARAMETERS: 0.2, "refit": "shift"}),
    (toy_vit, {PARAMETERS: 0.2}), (toy_swin, {PARAMETERS: 0.2}), (lively, {PARAMETERS: 0.2}),
    (toy_vit, {PARAMETERS: 0.1, "layers": (0,)}),  # a layer that is left out costs what it did
    (toy_vit, {MACS: 0.3, PARAMETERS: 0.05}), (toy_vit, {MACS: 0.1, PARAMETERS: 0.25}),
    (lively, {MACS: 0.25, PARAMETERS: 0.15}),
])  # fmt: skip
def test_budgets_are_met_and_one_is_used_whatever_the_other_pieces(store, build, pieces):
    run = extracted(store, build, **pieces)
    assert run.variance_kept is None
    found, dense = (macs(model).iloc[-1] for model in (run, run.dense()))
    columns = {MACS: "macs", PARAMETERS: "params"}
    over = [
        1 - found[column] / dense[column] - pieces[name]
        for name, column in columns.items()
        if name in pieces
    ]
    one_neuron = 65 / count_parameters(run.dense())
    assert min(over) > -1e-9
    assert min(over) < (CLOSE if MACS in pieces else max(CLOSE, one_neuron))


@pytest.mark.parametrize(("settings", "pieces", "words"), [
    (best, {"macs_reduction": 0.99}, "a budget of MACs.*too few"),
    (best, {"params_reduction": 0.99}, "a budget of parameters.*too few"),
    (quick, {"macs_reduction": 0.99}, "a MACs reduction of 99.0%; found at most"),
    (quick, {"macs_reduction": 0.1, **NOTHING}, r"reduction of 10.0%; found at most 0\.0%"),
])  # fmt: skip
def test_a_budget_that_cannot_be_met_is_refused_with_what_can(store, settings, pieces, words):
    with pytest.raises(MoeeError, match=words):
        extracted(store, settings=settings, **pieces)


# What one layer keeps


@pytest.fixture(scope="module")
def planned(store):
    """Experts and scores of the two recipes for a toy; and a function that allocates a budget."""
    model, found = toy_vit(), {}
    for settings in (best, quick):
        config = settings().resolved()
        tokens = calibration_tokens(model, IMAGES, config, root=store)
        layers = group_tokens(tokens, config)
        scores = score_neurons(tokens, layers, order=config.order, metric=config.metric)
        found[settings] = layers, scores

    def allocate(settings=best, **given):
        config = settings(**given).resolved()
        dense = count(model)
        return Budget(model, dense, dense.total, config).allocate(*found[settings])

    return found, allocate


@pytest.mark.parametrize("p", [0.3, 0.9])
def test_with_a_share_every_expert_keeps_the_fewest_neurons_that_hold_it(planned, p):
    found, allocate = planned
    sizes = allocate(quick, variance_kept=p)
    assert sizes.variance_kept == p
    for name, scores in found[quick][1].items():
        np.testing.assert_array_equal(sizes.neurons[name], keep_share(scores, p))


@pytest.mark.parametrize("budget", [{"macs_reduction": 0.2}, {"variance_kept": 1.0}])
def test_a_share_leaves_constant_experts_empty(planned, budget):
    kept = planned[1](budget="share", **budget).neurons
    assert kept["blocks.2.mlp"].any(axis=1).tolist() == [True, False]
    assert all(mask.any(axis=1).all() for name, mask in kept.items() if "2" not in name)
