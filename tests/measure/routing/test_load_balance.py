from dataclasses import replace

import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.baselines.moefication import MoeficationConfig, convert
from moee_analysis.measure.routing.load_balance import METRICS, balance_metrics
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_vit


@pytest.fixture(scope="module")
def routes():
    return measure.routes(toy_moe(toy_vit()), toy_images())


def test_shares_sum_to_one_and_ranks_sort_them(routes):
    table = measure.routing(routes)
    assert list(table.groupby("layer")["n_experts"].first()) == [4, 4, 4]
    for _, layer in table.groupby("layer"):
        assert layer["share"].sum() == pytest.approx(1)
        assert layer["tokens"].sum() == 24 * 17
        assert layer.sort_values("rank")["share"].is_monotonic_decreasing
        assert sorted(layer["rank"]) == [0, 1, 2, 3]


def test_several_experts_per_token_still_sum_to_one():
    images, config = toy_images(6), MoeficationConfig(active=3 / 8, n_experts=8, router="centre")
    routes = measure.routes(convert(toy_vit(), images, config), images, system="MoEfication")
    table = measure.routing(routes)
    assert (set(table["k"]), set(table["system"])) == ({3}, {"MoEfication"})
    assert table.groupby("layer")["share"].sum().to_numpy() == pytest.approx(1)
    assert table["share"].max() <= 1 / 3 + 1e-12
    assert routes.shares(0).sum() == pytest.approx(3)
    assert not routes.experts


def test_a_model_is_routed_and_systems_stand_side_by_side(routes):
    assert measure.routing(toy_moe(toy_vit()), toy_images()).equals(measure.routing(routes))
    both = [routes, replace(routes, system="again")]
    for table in (measure.routing(both), measure.balance(both, resamples=5)):
        assert list(table["system"].unique()) == ["MoEE", "again"]


def test_metrics_are_the_obvious_ones():
    even, single = balance_metrics(np.full(8, 5)), balance_metrics(np.eye(8)[0])
    assert [float(even[m]) for m in METRICS] == pytest.approx([1, 0, 1, 0, 0])
    assert [float(single[m]) for m in METRICS] == pytest.approx([0, 7 / 8, 8, 7, 7])
    tokens = np.array([40, 3, 0, 7, 25])
    shares, used = tokens / 75, tokens[tokens > 0] / 75
    expected = {
        "entropy": -(used * np.log(used)).sum() / np.log(5),
        "gini": np.abs(shares[:, None] - shares).sum() / (2 * len(shares) ** 2 * shares.mean()),
        "cv2": (shares.std() / shares.mean()) ** 2, "max_over_mean": 40 / 15, "dead": 1,
    }  # fmt: skip
    assert balance_metrics(tokens) == pytest.approx(expected)


def test_balance_has_a_row_for_every_layer_and_metric(routes):
    table = measure.balance(routes, resamples=200)
    assert list(table["metric"]) == 3 * [*METRICS]
    smooth = table[table["metric"].isin(["entropy", "gini", "cv2"])]
    assert smooth["value"].between(smooth["low"], smooth["high"]).all()
    assert measure.balance(routes, resamples=200).equals(table)
    metrics = balance_metrics(measure.routing(routes).query("layer == 1")["tokens"].to_numpy())
    assert table.query("layer == 1")["value"].tolist() == pytest.approx([*metrics.values()])


def test_more_images_make_narrower_intervals(routes):
    counts = {layer: np.tile(c, (16, 1)) for layer, c in routes.counts.items()}
    many = replace(routes, counts=counts, labels=np.tile(routes.labels, 16))
    few, many = (
        measure.balance(r, resamples=200).query("metric == 'gini'").eval("high - low").to_numpy()
        for r in (routes, many)
    )
    assert (many < 0.5 * few).all()
