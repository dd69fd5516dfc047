from functools import cache, partial

import numpy as np
import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines.common import equal_parts
from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.moefication import (
    MoeficationConfig,
    convert,
    matching_active,
    oracle_routed,
)
from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import capture
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import moe_layers, set_dispatch
from moee_analysis.utils.checks import choices_of
from tests.helpers.families import small
from tests.helpers.images import contents, toy_images
from tests.helpers.models import pixels_of, same_models, toy_swin, toy_vit

IMAGES = toy_images(12)
ROUTERS, SPLITS = map(choices_of(MoeficationConfig).get, ("router", "split"))
ALL_TOKENS = 10**6
X = next(IMAGES.batches(toy_vit()))


def moefied(dense=None, **settings):
    settings = {"n_experts": 8, **settings}
    if "macs_reduction" not in settings:
        settings = {"active": 0.25, **settings}
    return convert(dense or toy_vit(), IMAGES, MoeficationConfig(**settings))


@cache
def layer_of(**settings):
    """The only layer of a model; not to be changed."""
    return moe_layers(moefied(toy_vit(depth=1), **settings))[0]


def tokens(count=200):
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


def seen_by(model, name, side="inputs"):
    """All that a module gets, or gives, (tokens, width)."""
    with capture(model, [name], side) as found:
        model(torch.cat(list(IMAGES.batches(model))))
    return found[name].flatten(0, 1)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("compensated", [False, True])
def test_all_experts_together_are_the_dense_model(split, router, compensated):
    dense, settings = toy_vit(depth=1), {"split": split, "router": router}
    same = moefied(dense, active=1.0, mean_compensation=compensated, **settings)
    torch.testing.assert_close(same(X), dense(X), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [toy_swin, partial(small, "small_convnext")])
def test_other_families_are_converted(make):
    dense, seen = make(), pixels_of(make())
    settings = {"n_experts": 4, "mean_compensation": True}
    same, half = (moefied(dense, active=active, **settings)(seen) for active in (1.0, 0.5))
    torch.testing.assert_close(same, dense(seen), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(half, dense(seen), atol=1e-2)


def test_only_named_layers_are_converted_with_the_activation_that_they_have():
    relu = toy_vit()
    relu.blocks[1].mlp.act = torch.nn.ReLU()
    model = moefied(relu, active=1.0, mean_compensation=True, layers=(1,))
    torch.testing.assert_close(model(X), relu(X), atol=1e-5, rtol=1e-5)
    assert list(moe_layers(model)) == [1]


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("compensated", [False, True])
def test_a_layer_computes_its_chosen_neurons_and_means_of_the_others(router, compensated):
    """Token by token, by the definition: b2 + sum of W2_e a_e of chosen, W2_e mu_e of others."""
    layer = layer_of(router=router, mean_compensation=compensated)
    mlp = toy_vit(depth=1).blocks[0].mlp
    inputs, mean = tokens(20), layer.origin.mean.float()
    chosen, hidden = layer.router(inputs), mlp.act(mlp.fc1(inputs))
    assert chosen.shape == (20, 2)
    for token, out in enumerate(layer(inputs)):
        used = torch.zeros(64, dtype=torch.bool)
        for expert in chosen[token].tolist():
            used[layer.kept[layer.expert_neurons(expert)]] = True
        assert used.sum() == 16
        expected = mlp.fc2(torch.where(used, hidden[token], compensated * mean))
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(layer.router(inputs), chosen)


def test_compensation_leaves_the_mean_output_as_it_was():
    """Exactly so where the router does not look at the tokens."""
    dense, error = toy_vit(depth=1), {}
    expected = seen_by(dense, "blocks.0.mlp", "outputs").mean(0)
    for compensated in (False, True):
        settings = {"router": "centre", "tokens": ALL_TOKENS}
        model = moefied(toy_vit(depth=1), mean_compensation=compensated, **settings)
        model = constantly_routed(model)
        found = seen_by(model, "blocks.0.mlp", "outputs").mean(0)
        error[compensated] = (found - expected).norm().item()
    assert error[True] < 0.02 * error[False]
    mean = seen_by(dense, "blocks.0.mlp.fc2").double().mean(0)
    (layer,) = moe_layers(model).values()
    # recorded in half precision
    torch.testing.assert_close(layer.origin.mean, mean, atol=2e-3, rtol=2e-3)


def test_shares_are_those_of_the_calibration_tokens():
    model = moefied(tokens=ALL_TOKENS)
    routes = measure.routes(model, IMAGES)
    np.testing.assert_allclose(moe_layers(model)[0].shares, routes.shares(0), atol=1e-2)
    assert all(abs(layer.shares.sum() - 2) < 1e-5 for layer in moe_layers(model).values())


@pytest.mark.parametrize(("settings", "sizes"), [
    ({"n_experts": 8}, [8] * 8),
    ({"n_experts": 6}, [11, 11, 11, 11, 10, 10]),
    ({"n_experts": None}, [8] * 8),
])  # fmt: skip
@pytest.mark.parametrize("split", SPLITS)
def test_experts_have_equal_sizes(split, settings, sizes):
    layer = layer_of(split=split, router="centre", active=0.5, **settings)
    assert sorted(layer.expert_sizes, reverse=True) == sizes
    assert sorted(layer.neurons.tolist()) == list(range(64))


@pytest.mark.parametrize("method", ["metis", "spectral"])
def test_a_layer_says_how_the_graph_was_divided(method, monkeypatch):
    if method == "metis":
        pytest.importorskip("pymetis")
    monkeypatch.setattr(equal_parts, "find_spec", lambda _: "there" if method == "metis" else None)
    (layer,) = moe_layers(moefied(toy_vit(depth=1), split="graph")).values()
    assert layer.origin.split == f"graph, {method}"
    assert layer_of(router="centre").origin.split == "kmeans"


@pytest.mark.parametrize("router", ["centre", "mlp"])
@pytest.mark.parametrize("make", [toy_vit, toy_swin])
def test_the_budget_is_met_to_within_one_expert_and_pays_the_router(make, router):
    dense, goal = make(), 0.8 * count(make()).total
    table = measure.macs(moefied(dense, macs_reduction=0.2, router=router))
    one = table["macs_dense"].iloc[:-2].max() / 8
    assert goal - one - 1 <= table["macs"].iloc[-1] <= goal + 1


STORED = {"centre": 8 * 32, "mlp": 8 * 32 + 8 * 8}  # parameters beside those of the dense model


@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("settings", [{}, {"mean_compensation": True}])
def test_what_is_counted_is_what_runs_and_no_parameters_are_saved(router, settings):
    dense = toy_vit(depth=1)
    model = moefied(dense, router=router, **settings)
    means = 8 * 32 if "mean_compensation" in settings else 0
    assert count_parameters(model) == count_parameters(dense) + STORED.get(router, 0) + means
    expected = measure.macs(model)["macs"].iloc[-1]
    set_dispatch(model, "sorted")
    assert count(model, sites=[]).total == pytest.approx(expected, abs=3)


def test_a_cheaper_router_and_fewer_layers_leave_and_cost_experts():
    def active(**settings):
        return matching_active(toy_vit(), MoeficationConfig(n_experts=8, **settings))

    of_routers = [active(macs_reduction=0.2, router=r) for r in ("centre", "mlp")]
    assert of_routers[0] > of_routers[1]
    assert active(macs_reduction=0.1, layers=(0, 1)) < active(macs_reduction=0.1)
    for share, k in ((0.25, 2), (0.5, 4), (1.0, 8)):
        assert active(active=share) == share
        assert layer_of(active=share, router="centre").router.k == k


def test_a_recording_is_found_again(tmp_path, capsys):
    models = []
    for split, said in (("kmeans", True), ("graph", False)):
        config = MoeficationConfig(active=0.25, n_experts=8, split=split)
        models.append(convert(toy_vit(), IMAGES, config, store=tmp_path))
        (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
        assert ("recording 3 layers" in capsys.readouterr().err) == said
    assert contents(folder)
    assert not same_models(*models)


@pytest.mark.parametrize(("split", "router"), [
    *[(split, "centre") for split in SPLITS], *[("random", router) for router in ROUTERS[1:]],
])  # fmt: skip
def test_the_seed_decides(split, router):
    settings = {"split": split, "router": router}
    one, again, other = (moefied(toy_vit(depth=1), seed=s, **settings) for s in (0, 0, 3))
    assert same_models(one, again)
    chosen = [moe_layers(model)[0].router(tokens()) for model in (one, again, other)]
    assert torch.equal(chosen[0], chosen[1])
    assert not torch.equal(chosen[0], chosen[2])


def test_conversion_works_where_gradients_are_off_and_leaves_models_trainable():
    model = moefied(toy_vit().requires_grad_(requires_grad=True), mean_compensation=True)
    with torch.inference_mode():
        frozen = moefied(mean_compensation=True)
    assert torch.equal(model(X), frozen(X))
    assert not any(p.requires_grad for p in frozen.parameters())
    assert not any(b.requires_grad for b in moe_layers(model)[0].buffers())
    for each in (model, frozen.requires_grad_(requires_grad=True)):
        each(X).square().sum().backward()
        layer = moe_layers(each)[1]
        grads = [p.grad for p in (layer.fc1.weight, layer.fc2.weight, layer.shift)]
        assert all(grad.abs().sum() > 0 for grad in grads)


def test_the_oracle_and_the_random_control_use_as_many_experts():
    settings = {"active": 0.5, "mean_compensation": True}
    model = moefied(toy_vit(depth=1), **settings)
    (best,) = moe_layers(oracle_routed(model)).values()
    own = layer_of(router="oracle", **settings).router(tokens())
    assert torch.equal(best.router(tokens()), own)
    assert not torch.equal(moe_layers(model)[0].router(tokens()), own)
    assert moe_layers(randomly_routed(model))[0].router(tokens()).shape == (200, 4)


@pytest.mark.parametrize(("settings", "message"), [
    ({"active": 0.0}, "share"), ({"active": 1.5}, "share"), ({"macs_reduction": 1.0}, "share"),
    ({"macs_reduction": 0.2, "active": 0.5}, "one of them"),
    ({"n_experts": 0}, "n_experts"), ({"tokens": 0}, "tokens"), ({"seed": -1}, "seed"),
    ({"router": "best"}, "centre, mlp, oracle"), ({"split": "best"}, "kmeans, graph, random"),
    ({"active": 0.5, "n_experts": 65}, "1 to 64 experts"),
    ({"active": 0.5, "layers": (3,)}, "layers between 0 and 2"),
    ({"active": 0.5, "layers": ()}, "layers between 0 and 2"),
    ({"macs_reduction": 0.9}, "MACs reduction between 0.000 and 0"),
    ({"macs_reduction": 0.28, "router": "oracle", "n_experts": 1}, "leaves MACs to save"),
])  # fmt: skip
def test_impossible_requests_are_refused(settings, message):
    with pytest.raises(MoeeError, match=message):
        convert(toy_vit(), IMAGES, MoeficationConfig(**{"n_experts": 8, **settings}))


def test_true_scores_keep_more_of_a_trained_prediction_than_centres(bundled, bundled_images):
    config = MoeficationConfig(router="centre", active=0.5, tokens=6000)
    centre = convert(bundled, bundled_images["calibration"], config)
    x = torch.cat(list(bundled_images["evaluation"].batches(bundled)))
    with torch.inference_mode():
        expected, found, best = (m(x) for m in (bundled, centre, oracle_routed(centre)))
    assert (best - expected).norm() < (found - expected).norm()
