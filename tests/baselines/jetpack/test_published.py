import pytest

from moee_analysis.baselines.jetpack.published import (
    CONFIGURATIONS,
    CONTRIBUTIONS,
    METHODS,
    build,
    layers_of,
    published,
)


@pytest.fixture(scope="module")
def table():
    return published()


def test_parameters_are_the_papers(table):
    assert len(table) == 11
    off = (table.params_counted - table.params).abs()
    assert ((off < 0.5) | (off < 0.005 * table.params)).all()
    by_size = table.sort_values("params").params_counted
    assert by_size.iloc[-4:].tolist() == pytest.approx([351.9, 353.9, 1058.1, 1412.0], abs=0.1)


def test_macs_without_mixing_are_those_of_the_dense_model_and_the_experts(table):
    vit = table.macs_counted[0]
    rest = table.macs_counted - table.macs_of_mixing
    soft = table.model == "Soft MoE-T"  # as many slots as tokens
    assert rest[soft].item() == pytest.approx(vit, rel=1e-6)
    jet = table[(table.model == "V-JetMoE-T") & (table.first_layer == 7) & (table.core == 98)]
    dense_mlp, experts = 197 * 8 * 192**2, (98 + 196 / 4) * 8 * 192**2
    expected = vit - 6 * (dense_mlp - experts) / 1e9
    assert rest[jet.index].item() == pytest.approx(expected, rel=1e-6)


def test_the_papers_flops_lie_between_ours_with_and_without_what_it_leaves_out(table):
    least = table.macs_counted - table.macs_of_mixing - table.macs_of_attention
    jet = table[table.core > 0]
    assert (jet.flops > least[jet.index] - 0.05).all()
    assert (table.flops < table.macs_counted + 0.05).all()


def test_models_have_no_weights_and_count_layers_from_0():
    row = CONFIGURATIONS.loc[4]
    assert row.first_layer == 11
    assert layers_of(row) == (10, 11)
    assert all(p.is_meta for p in build(row).parameters())


def test_figures_that_stand_in_several_tables_agree():
    by_name = METHODS.set_index("method")["ImageNet-1k"]
    tiny = CONFIGURATIONS[CONFIGURATIONS.model == "V-JetMoE-T"]
    assert by_name["importance"] == tiny.imagenet.max() == 79.9
    assert CONTRIBUTIONS.layer.tolist() == list(range(7, 13))
