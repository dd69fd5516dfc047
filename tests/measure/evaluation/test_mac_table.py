import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.baselines.moefication import MoeficationConfig, convert
from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers, set_dispatch
from tests.helpers.images import toy_images
from tests.helpers.models import reduced_attention, toy_kinds, toy_moe, toy_swin, toy_vit

SUMS = ["macs_dense", "macs", "params_dense", "params"]


@pytest.mark.parametrize("make", [toy_vit, toy_swin])
def test_the_dense_columns_are_the_dense_model_and_totals_are_sums(make):
    dense, model = count(make()), toy_moe(make(), layers={1})
    table = measure.macs(model).set_index("component")
    parts, total = table.iloc[:-1], table.loc["total"]
    assert list(table.index) == [*dense.tokens, "everything else", "total"]
    assert total["macs_dense"] == dense.total
    assert total["params_dense"] == count_parameters(make())
    assert total["params"] == count_parameters(model)
    by_module = {name: dense.by_module[name] for name in dense.tokens}
    assert parts["macs_dense"].drop("everything else").to_dict() == by_module
    np.testing.assert_allclose(parts[SUMS].sum(), total[SUMS].astype(float))


def test_layers_with_everything_are_counted_as_stored():
    model, images = toy_kinds(toy_vit(), layers={1}), toy_images(6)
    layer, shares = moe_layers(model)[1], measure.routes(model, images).shares(1)
    row = measure.macs(model, images).iloc[1]
    router, sizes = 3 * 32 * 16, layer.sizes.numpy()
    assert row["macs"] == pytest.approx(router + 17 * 2 * 32 * (shares @ sizes))
    stored = len(layer.kept) * 65 + 32
    assert row["params"] == stored + 4 * 32 + 3 * 33
    assert row["macs_dense"] == 17 * 2 * 32 * 64
    assert measure.macs(model)["macs"].iloc[1] == pytest.approx(17 * layer.macs_per_token())


def test_shares_are_those_of_the_images_where_there_are_any():
    model, images = toy_moe(toy_vit()), toy_images(6)
    routes, table = measure.routes(model, images), measure.macs(model, images)
    calibrated, layer = measure.macs(model), moe_layers(model)[0]
    for found, shares in ((table, routes.shares(0)), (calibrated, layer.shares.numpy())):
        expected = shares @ layer.sizes.numpy()
        assert found["macs"].iloc[0] == pytest.approx(17 * (4 * 32 + 2 * 32 * expected))
        assert found["active_fraction"].iloc[0] == pytest.approx(expected / 64)
    assert table["union_fraction"].iloc[0] == len(layer.kept) / 64
    assert table["experts"].iloc[0] == 4
    assert set(table.loc[table["converted"], "share_source"]) == {"evaluated images"}
    assert measure.macs(model, routes=routes).equals(table)
    assert set(calibrated["share_source"]) == {"calibration", "dense"}
    assert "6 images" in table.attrs["caption"]


def test_a_dense_model_saves_nothing():
    table = measure.macs(toy_vit(), toy_images(2))
    assert (table["macs"] == table["macs_dense"]).all()
    assert not table["converted"].any()
    assert table["active_fraction"].iloc[-1] == 1


@pytest.mark.parametrize("active", [0.5, 1.0])
def test_counted_while_running_the_experts_cost_what_is_expected(active):
    """All experts of a layer are equal and each runs by itself: a real pass must agree."""
    config = MoeficationConfig(active=active, n_experts=4, router="centre")
    model = convert(toy_vit(), toy_images(2), config)
    set_dispatch(model, "sorted")
    expected = pytest.approx(measure.macs(model)["macs"].iloc[-1], abs=0.5)
    assert count(model, sites=()).total == expected


def test_routes_of_another_model_are_refused():
    routes = measure.routes(toy_moe(toy_vit(), n_experts=3), toy_images(3))
    with pytest.raises(MoeeError, match="4 experts"):
        measure.macs(toy_moe(toy_vit()), routes=routes)


def test_attention_of_lower_rank_has_rows_of_its_own():
    model = reduced_attention(toy_moe(toy_vit(), layers={1}), queries=1)
    dense, own = count(toy_vit()).by_module, count(model).by_module
    row = measure.macs(model).set_index("component").loc["blocks.2.attn"]
    assert row["macs_dense"] == dense["blocks.2.attn"]
    assert row["params_dense"] == count_parameters(toy_vit().blocks[2].attn)
    assert row["macs"] == own["blocks.2.attn"] < row["macs_dense"]
    assert row["params"] == count_parameters(model.blocks[2].attn)
    total = measure.macs(model).iloc[-1]
    assert total["macs_dense"] == count(toy_vit()).total
    assert total["params_dense"] == count_parameters(toy_vit())
    assert total["params"] == count_parameters(model)
