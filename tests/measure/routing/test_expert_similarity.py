import numpy as np
import pytest
from scipy.spatial.distance import cosine

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.moe.layer import moe_layers
from tests.helpers.models import toy_kinds, toy_moe, toy_vit


def test_cosines_agree_with_scipy():
    centres = np.random.default_rng(0).normal(size=(5, 16)) + 1
    shares = np.array([0.4, 0.3, 0.1, 0.1, 0.1])
    table = measure.similarity({3: centres}, shares={3: shares})
    for column, points in {"cosine": centres, "cosine_centred": centres - shares @ centres}.items():
        pairs = zip(points[table["expert_a"]], points[table["expert_b"]], strict=True)
        np.testing.assert_allclose(table[column], [1 - cosine(a, b) for a, b in pairs])
    assert len(table) == 25


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


def test_summary_counts_pairs_of_different_experts_once():
    centres = np.array([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
    summary = measure.similarity_summary(measure.similarity({0: centres})).iloc[0]
    assert summary["near_orthogonal"] == pytest.approx(1 / 3)
    assert (summary["min"], summary["experts"]) == (0, 3)
    assert summary["max"] == pytest.approx(np.sqrt(0.5))


def test_like_experts_stand_together():
    two = np.random.default_rng(2).normal(size=(2, 32))
    centres = np.tile(two, (3, 1)) + 0.1 * np.random.default_rng(3).normal(size=(6, 32))
    table = measure.similarity({0: centres}).drop_duplicates("expert_a").sort_values("order_a")
    assert (table["expert_a"].to_numpy()[:3] % 2).std() == 0


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


@pytest.mark.parametrize("make", [lambda model: model, toy_kinds])
def test_models_without_centres_are_refused(make):
    with pytest.raises(MoeeError, match="routers have centres"):
        measure.similarity(make(toy_vit()))


@pytest.mark.parametrize("experts", [1, 2])
def test_few_experts(experts):
    table = measure.similarity({0: np.eye(experts, 4)})
    assert measure.similarity_summary(table)["experts"].item() == experts
    assert table["order_a"].max() == experts - 1
