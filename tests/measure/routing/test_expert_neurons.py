import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.experts import expected_jaccard
from moee_analysis.moe.layer import moe_layers
from tests.helpers.models import toy_kinds, toy_moe, toy_vit


@pytest.fixture(scope="module", params=[toy_moe, toy_kinds])
def model(request):
    return request.param(toy_vit(depth=2))


def kept_sets(model, layer):
    module = moe_layers(model)[layer]
    neurons = module.kept.numpy()
    return [set(neurons[module.expert_neurons(e).numpy()]) for e in range(module.n_experts)]


def test_sizes_are_those_of_the_layers(model):
    table = measure.sizes(model)
    for layer, module in moe_layers(model).items():
        part = table[table["layer"] == layer]
        assert part["neurons"].tolist() == module.expert_sizes
        np.testing.assert_allclose(part["fraction"] * 64, part["neurons"])
        np.testing.assert_allclose(part["share"], module.shares)
        np.testing.assert_allclose(part["active"], (part["fraction"] * part["share"]).sum())
        assert part["union"].iloc[0] == len(module.kept) / 64


def test_overlap_agrees_with_sets(model):
    sets = kept_sets(model, 1)
    table = measure.overlap(model, layers=[1])
    assert len(table) == len(sets) ** 2
    for row in table.itertuples():
        a, b = sets[row.expert_a], sets[row.expert_b]
        assert (row.shared, row.neurons_a, row.neurons_b) == (len(a & b), len(a), len(b))
        assert row.jaccard == pytest.approx(len(a & b) / max(1, len(a | b)))


def test_expected_jaccard_agrees_with_random_subsets():
    rng = np.random.default_rng(0)
    draws = [[set(rng.choice(30, n, replace=False)) for n in (12, 7)] for _ in range(4000)]
    mean = np.mean([len(a & b) / len(a | b) for a, b in draws])
    assert expected_jaccard(12, 7, 30) == pytest.approx(mean, abs=0.005)
    assert expected_jaccard(30, 30, 30) == pytest.approx(1)
    assert expected_jaccard(0, 5, 30) == expected_jaccard(0, 0, 30) == 0
    table = measure.overlap(toy_moe(toy_vit(depth=2))).query("expert_a < expert_b")
    assert table["jaccard"].mean() == pytest.approx(table["expected_jaccard"].mean(), abs=0.06)


def test_neurons_are_all_of_the_dense_mlp_those_of_most_experts_first(model):
    table, sets = measure.neurons(model, layers=[0]), kept_sets(model, 0)
    for expert, part in table.groupby("expert"):
        assert set(part.loc[part["kept"], "neuron"]) == sets[expert]
        assert sorted(part["order"]) == list(range(64))
    experts = table.groupby("order")["kept"].sum().to_numpy()
    assert (np.diff(experts) <= 0).all()
    assert experts[-1] == 0


@pytest.mark.parametrize("measured", [measure.sizes, measure.neurons, measure.overlap])
def test_dense_models_and_layers_are_refused(measured):
    with pytest.raises(MoeeError, match="only dense layers"):
        measured(toy_vit())
    with pytest.raises(MoeeError, match="layer 1"):
        measured(toy_moe(toy_vit(), layers=[0, 2]), layers=[1])
