from dataclasses import replace

import numpy as np
import pytest
import torch

from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SoftRouter, SpheroRouter
from moee_analysis.baselines.jetpack import JetpackConfig, convert, narrowed, successor
from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import count
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, lively, same_models, toy_swin, toy_vit
from tests.helpers.widened import convnext, lively_ones, vit, widened_convnext, widened_vit

BLIND = ("uniform", "random")  # they do not look at activations
METHODS = ("importance", "graph", *BLIND)
IMAGES = toy_images(12)
X = next(IMAGES.batches(toy_vit()))
FEW = {"core": 3, "universal": 5}
PLANTED = {
    "vit": (lambda: lively_ones(vit(2)), widened_vit),
    "convnext": (lambda: lively_ones(convnext(16)), widened_convnext),
}
MAKERS = {"vit": toy_vit, "convnext": lambda: lively_ones(convnext(32))}


def jet(dense=None, images=IMAGES, **settings):
    return convert(dense or toy_vit(), images, JetpackConfig(**settings))


def slot_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, SlotMlp)}


def check_expert(layer, number, mlp):
    """A core expert is the MLP."""
    x = torch.randn(7, mlp.fc1.in_features, generator=torch.Generator().manual_seed(0))
    experts = layer.groups[0]
    found = experts(x.expand(1, experts.n_experts, *x.shape))[0, number]
    torch.testing.assert_close(found, mlp(x))


@pytest.fixture(scope="module", params=PLANTED)
def planted(request):
    make, widen = PLANTED[request.param]
    narrow = make()
    return narrow, widen(narrow)


@pytest.mark.parametrize("method", ["importance", "graph"])
def test_core_experts_find_all_that_was_planted(planted, method):
    _, wide = planted
    config = JetpackConfig(width=16, method=method, **FEW)
    small = narrowed(wide, IMAGES, config)
    for place, layer in slot_layers(convert(wide, IMAGES, config)).items():
        mlp = small.get_submodule(place)
        for number in range(3 if method == "importance" else 0):  # what never fires is drawn last
            check_expert(layer, number, mlp)
        torch.testing.assert_close(layer.groups[0].fc2_bias[1], mlp.fc2.bias)
        assert layer.groups[0].hidden == mlp.fc1.out_features


@pytest.mark.parametrize("consistent", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_the_seed_decides_which_units_experts_have_and_all_or_each_have_their_channels(
    method, consistent
):
    images, dense = IMAGES.take([]) if method in BLIND else IMAGES, lively_ones(toy_vit())
    settings = {"method": method, "consistent_channels": consistent, "core": 4, "universal": 4}
    first, again, other = (jet(dense, images, width=16, seed=s, **settings) for s in (1, 1, 2))
    assert same_models(first, again)
    assert not same_models(first, other)
    for layer in slot_layers(first).values():
        for group in layer.groups:
            distinct = len({tuple(weights.flatten().tolist()) for weights in group.fc1_weight})
            assert (distinct == 1) == (method == "uniform")
        channels = len(torch.unique(layer.groups[0].fc2_bias, dim=0))
        if method != "graph" or consistent:  # few channels have few parts
            assert channels == (1 if consistent or method == "uniform" else 4)


def test_small_experts_of_the_released_code_thin_out_a_large_one():
    settings = {"consistent_channels": False, "universal_ratio": 0.5, **FEW}
    model = jet(width=16, method="uniform", **settings)
    channels = np.linspace(0, 31, 16).round()
    small = np.linspace(0, 63, 32).round()[channels.astype(int)]
    expected = toy_vit().blocks[2].mlp.fc1.weight[small][:, channels]
    assert torch.equal(model.blocks[2].mlp.groups[1].fc1_weight[0], expected)


def test_sizes_are_as_told_of_both_kinds_of_experts_or_one():
    layers = slot_layers(jet(width=16, universal_ratio=0.25, slots=2, layers=(0, 2), **FEW))
    assert set(layers) == {"blocks.0.mlp", "blocks.2.mlp"}
    for layer in layers.values():
        assert [(group.n_experts, group.hidden) for group in layer.groups] == [(3, 32), (5, 8)]
        assert layer.router.queries.shape == (8, 2, 16)
    model = jet(core=0, universal=4)
    assert [len(layer.groups) for layer in slot_layers(model).values()] == [1, 1]
    assert model(X).shape == (12, 6)


def test_by_default_there_are_half_as_many_core_experts_as_patches():
    layers = slot_layers(jet(method="uniform"))
    assert set(layers) == {"blocks.1.mlp", "blocks.2.mlp"}  # the second half, at least
    layers |= slot_layers(jet(MAKERS["convnext"](), method="uniform"))
    experts = {n: [g.n_experts for g in layer.groups] for n, layer in layers.items()}
    assert experts["blocks.1.mlp"] == experts["blocks.2.mlp"] == [8, 16]
    assert experts["stages.1.blocks.1.mlp"] == [8, 16]  # 4 x 4 patches
    assert experts["stages.3.blocks.0.mlp"] == [1, 2]  # a single one


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("settings", [{}, {"width": 16}, {"method": "uniform"}])
def test_outside_its_experts_it_is_the_narrowed_model_and_the_dense_one_is_not_touched(
    name, settings
):
    config, dense = JetpackConfig(**settings, **FEW), MAKERS[name]()
    small, model = narrowed(dense, IMAGES, config), convert(dense, IMAGES, config)
    layers = slot_layers(model)
    new = {f"{place}.{p}" for place, layer in layers.items() for p in layer.state_dict()}
    rest = {n: t for n, t in model.state_dict().items() if n not in new}
    assert rest
    assert all(torch.equal(small.state_dict()[n], t) for n, t in rest.items())
    if settings == {"method": "uniform"}:  # core experts, evenly spaced among as many neurons
        for place, layer in layers.items():
            for number in range(3):
                check_expert(layer, number, dense.get_submodule(place))
    for parameter in model.requires_grad_(requires_grad=True).parameters():
        parameter.data.add_(1)
    assert same_models(dense, MAKERS[name]())
    assert hooks_of(dense) == 0
    assert not any(p.requires_grad for p in dense.parameters())


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("settings", [{"router": "soft"}, {}])
def test_it_is_noisy_in_training_alone_and_all_its_experts_learn(name, settings):
    model = jet(MAKERS[name](), width=16, **settings, **FEW)
    assert not model.training
    assert model(X).shape == (12, MAKERS[name]().num_classes)
    assert torch.equal(model(X), model(X))
    model.train()
    assert not torch.equal(model(X), model(X))
    layers = slot_layers(model).values() if name == "vit" else []  # of one token none is mixed
    for layer in layers:  # no expert may drop out
        layer.drop.rate = layer.groups[0].drop.p = layer.groups[1].drop.p = 0.0
    model.requires_grad_()(X).square().sum().backward()
    for layer in layers:
        assert all(parameter.grad.abs().sum() > 0 for parameter in layer.parameters())
        for group in layer.groups:
            assert (group.fc1_weight.grad.abs().sum(dim=(1, 2)) > 0).all()


def test_the_configuration_reaches_the_layers():
    layers = slot_layers(jet(
        router="sphero", temperature=0.7, noise=0.3, drop=0.2, expert_drop=0.4, **FEW,
    ))  # fmt: skip
    for index, layer in enumerate(layers.values(), 1):
        router = layer.router
        assert isinstance(router, SpheroRouter)
        assert router.dispatch_temperature.item() == pytest.approx(0.7)
        assert router.noise == 0.3
        assert layer.groups[0].drop.p == 0.2
        assert layer.drop.rate == pytest.approx(0.4 * index / 2)  # linear in depth
    first, second = (layer.router.queries for layer in layers.values())
    assert not torch.equal(first, second)
    soft = slot_layers(jet(router="soft", **FEW)).values()
    assert all(isinstance(layer.router, SoftRouter) for layer in soft)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("saved", [0.05, 0.1])
@pytest.mark.parametrize("experts", [{}, {"core": 1, "universal": 1}])
def test_a_budget_is_met_to_within_a_step(name, saved, experts):
    model = jet(MAKERS[name](), method="uniform", macs_reduction=saved, **experts)
    counted, steps = count(MAKERS[name]()), []
    for place, layer in slot_layers(model).items():
        mixing = 3 * counted.tokens[place] * layer.n_experts
        hidden = sum(2 * group.n_experts * group.hidden for group in layer.groups)
        units = layer.slots if experts else layer.groups[0].n_experts
        steps.append(layer.groups[0].fc1_weight.shape[2] * layer.slots * (mixing + hidden) / units)
    budget = (1 - saved) * counted.total
    assert budget - min(steps) < count(model, sites=[]).total <= budget


def test_a_budget_that_cannot_be_met_is_refused_with_the_largest_that_can():
    with pytest.raises(MoeeError, match="MACs reduction of at most") as error:
        jet(method="uniform", macs_reduction=0.9)
    most = float(error.value.expected.split()[-1].rstrip("%")) / 100
    jet(method="uniform", macs_reduction=most - 0.001)


@pytest.mark.parametrize(("settings", "expected"), [
    ({"method": "copy"}, "method among importance"),
    ({"core": 3}, "None for both"), ({"core": 0, "universal": 0}, "not both 0"),
    ({"width": 0}, "width as a whole number"), ({"slots": 0}, "slots as a whole number"),
    ({"universal_ratio": 0}, "universal_ratio as a share"),
    ({"temperature": 0}, "temperature as a number above 0"),
    ({"noise": -1.0}, "noise as a number at least 0"),
    ({"drop": 1.0}, "drop as a number at least 0 and below 1"),
    ({"macs_reduction": 0.2, "slots": 2}, "macs_reduction or slots"),
    ({"width": 16, "macs_reduction": 0.1}, "at the dense model's width"),
    ({"layers": (3,)}, "layers between 0 and 2"),
    ({"width": 24, "method": "uniform"}, "whole numbers of heads"),
    ({"width": 64, "method": "uniform"}, "at most 32"),
])  # fmt: skip
def test_settings_out_of_range_are_refused(settings, expected):
    with pytest.raises(MoeeError, match=expected):
        jet(**settings)


@pytest.mark.parametrize("method", METHODS)  # neurons below 0 matter as well
def test_narrowing_finds_all_that_matters_unless_it_is_blind(planted, method):
    narrow, wide = planted
    config = JetpackConfig(width=16, method=method, head="recycled")
    found = narrowed(wide, IMAGES, config)
    if method in BLIND:
        assert (found(X) - narrow(X)).abs().max() > 0.01
    else:
        assert not same_models(found, narrow)  # units are in other places
        torch.testing.assert_close(wide(X), narrow(X), atol=1e-4, rtol=1e-4)
        assert narrow(X).std(dim=0).mean() > 0.05  # images make a difference
        torch.testing.assert_close(found(X), narrow(X), atol=1e-4, rtol=1e-4)
    assert same_models(narrowed(wide, IMAGES, replace(config, width=None)), wide)


def test_a_successor_is_narrower_in_everything_and_takes_the_same_images():
    dense = toy_vit()
    small = successor(dense, 16)
    assert (small.embed_dim, small.blocks[0].attn.num_heads) == (16, 1)
    assert small.blocks[0].attn.head_dim == dense.blocks[0].attn.head_dim
    assert small.blocks[0].mlp.fc1.out_features == 32
    assert small(X).shape == dense(X).shape
    assert small.pretrained_cfg["label_names"] == dense.pretrained_cfg["label_names"]
    assert not small.training
    assert not any(p.requires_grad for p in small.parameters())
    small = successor(lively_ones(convnext(32)), 8)  # stages are narrowed alike
    assert [stage.blocks[0].mlp.fc1.in_features for stage in small.stages] == [4, 8, 8, 8]


def test_the_seed_decides_and_torch_random_numbers_go_on():
    dense, state = toy_vit(), torch.random.get_rng_state()
    first, again, other = (successor(dense, 16, seed=seed) for seed in (1, 1, 2))
    assert same_models(first, again)
    assert not same_models(first, other)
    fresh = successor(dense, 16, seed=3)
    found = narrowed(dense, IMAGES, JetpackConfig(width=16, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(found.head.weight, fresh.head.weight)
    assert not torch.equal(found.blocks[0].mlp.fc1.weight, fresh.blocks[0].mlp.fc1.weight)
    for small in (found, fresh):
        assert small(X).shape[1] == small.pretrained_cfg["num_classes"] == dense.num_classes


@pytest.mark.parametrize(("dense", "width", "expected"), [
    (toy_swin, 16, "VisionTransformer"), (MAKERS["convnext"], 5, "whole numbers of channels"),
    (lambda: lively(img_size=32, global_pool="map"), None, "plain"),
])  # fmt: skip
def test_what_has_no_successor_is_refused(dense, width, expected):
    with pytest.raises(MoeeError, match=expected):
        narrowed(dense(), IMAGES, JetpackConfig(width=width, method="uniform"))
