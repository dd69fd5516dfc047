import numpy as np
import pytest
from scipy.spatial.distance import cosine

from moee_analysis import measure
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


def test_cosines_agree_with_scipy_and_pairs_of_different_experts_are_counted_once():
    centres = np.random.default_rng(0).normal(size=(5, 16)) + 1
    shares = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    table = measure.similarity({3: centres}, shares={3: shares})
    for column, points in {"cosine": centres, "cosine_centred": centres - shares @ centres}.items():
        pairs = zip(points[table["expert_a"]], points[table["expert_b"]], strict=True)
        np.testing.assert_allclose(table[column], [1 - cosine(a, b) for a, b in pairs])
    assert len(table) == 25
    centres = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
    summary = measure.similarity_summary(measure.similarity({0: centres})).iloc[0]
    found = summary[["near_orthogonal", "min", "max", "experts"]]
    assert found.tolist() == pytest.approx([1 / 3, 0, np.sqrt(0.5), 3])


def test_a_common_mean_makes_raw_cosines_large_and_centred_ones_not():
    noise = np.random.default_rng(1).normal(size=(12, 64))
    table = measure.similarity({0: noise, 1: noise + 3})
    summary = measure.similarity_summary(table).set_index("layer")
    assert (summary.loc[0, ["mean", "common_mean"]] < 0.2).all()
    assert (summary.loc[1, ["mean", "common_mean"]] > 0.8).all()
    centred = summary[["centred_mean", "centred_spread", "centred_near_orthogonal"]]
    np.testing.assert_allclose(centred.loc[0], centred.loc[1])
    assert summary.loc[0, "centred_mean"] == pytest.approx(-1 / 11, abs=0.02)
    assert summary.loc[0, "centred_expected"] == -1 / 11


def test_like_experts_stand_together():
    two = np.random.default_rng(2).normal(size=(2, 32))
    centres = np.tile(two, (3, 1)) + 0.1 * np.random.default_rng(3).normal(size=(6, 32))
    table = measure.similarity({0: centres}).drop_duplicates("expert_a").sort_values("order_a")
    assert (table["expert_a"].to_numpy()[:3] % 2).std() == 0
    few = measure.similarity({1: np.eye(1, 4), 2: np.eye(2, 4)})
    assert measure.similarity_summary(few)["experts"].tolist() == [1, 2]
    assert few.groupby("layer")["order_a"].max().tolist() == [0, 1]


def test_a_routed_model_gives_its_centres_and_shares():
    model = toy_kinds(toy_moe(toy_vit(), layers={0, 2}), layers={1})  # no centres in layer 1
    layers = {n: m for n, m in moe_layers(model).items() if n != 1}
    given = measure.similarity(
        {n: m.router.centres.numpy() for n, m in layers.items()},
        shares={n: m.shares.numpy() for n, m in layers.items()},
    )
    found = measure.similarity(model)
    assert found["layer"].unique().tolist() == [0, 2]
    np.testing.assert_allclose(found["cosine_centred"], given["cosine_centred"], atol=1e-6)
    assert measure.similarity(model, layers=[2])["layer"].unique() == [2]
