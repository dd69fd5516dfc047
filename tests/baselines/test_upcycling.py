"""Soft MoE and Sparse Upcycling: copies of MLPs on slots, or on tokens that gates choose."""

from functools import partial

import pytest
import torch

from moee_analysis import measure
from moee_analysis.baselines import soft_moe, sparse_upcycling
from moee_analysis.baselines.controls import constantly_routed, randomly_routed
from moee_analysis.baselines.soft_moe import SoftMoeConfig
from moee_analysis.baselines.sparse_upcycling import SparseUpcyclingConfig
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import expert_layers
from tests.helpers.images import toy_images
from tests.helpers.models import lively, pixels_of, same_models, toy_swin, toy_vit

MODELS = {"vit": toy_vit, "swin": toy_swin, "convnext": partial(lively, "test_convnext")}
IMAGES = toy_images(6)


def soft(dense, **settings):
    return soft_moe.convert(dense, IMAGES, SoftMoeConfig(**{"experts": 4, **settings}))


def sparse(dense, **settings):
    config = SparseUpcyclingConfig(**{"experts": 4, **settings})
    return sparse_upcycling.convert(dense, IMAGES, config)


def top_k(dense, **settings):
    return sparse(dense, router="top_k", **settings)


SYSTEMS = [soft, sparse, top_k]


def all_layers(dense):
    return tuple(site.index for site in find_mlps(dense))


@pytest.mark.parametrize("convert", SYSTEMS)
def test_the_dense_model_is_not_touched_and_every_parameter_learns(convert):
    dense = toy_vit()
    model = convert(dense).requires_grad_().train()
    model(pixels_of(dense)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or "router" not in name
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert same_models(dense, toy_vit())
    assert not dense.blocks[1].mlp.fc1.weight.requires_grad


def test_dropout_is_for_training_only():
    dense = toy_vit()
    model, x = soft(dense, drop=0.5), pixels_of(dense)
    assert not model.training
    torch.testing.assert_close(model(x), soft(dense)(x), rtol=0, atol=0)
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("convert", SYSTEMS)
def test_measures_and_controls_take_the_model(convert):
    dense = toy_vit()
    model = convert(dense)
    systems = {"own": model, "random": randomly_routed(model), "constant": constantly_routed(model)}
    table = measure.accuracy(systems | {"dense": dense}, IMAGES, reference="dense")
    assert table["top1"].between(0, 1).all()
    total = measure.macs(model)["macs"].iloc[-1]
    assert count(systems["random"], sites=[]).total == total
    if convert is not soft:
        assert count(systems["constant"], sites=[]).total == total


def test_the_second_half_or_every_second_mlp_is_exchanged():
    for convert, numbers in ((soft, (3, 4, 5)), (sparse, (1, 3, 5))):
        assert list(expert_layers(convert(lively()))) == [f"blocks.{n}.mlp" for n in numbers]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("convert", "settings", "computed"), [
    (soft, {"slots": 1}, lambda _: 4), (soft, {"slots": 3}, lambda _: 12),
    (soft, {}, lambda tokens: 4 * round(tokens / 4)),
    (top_k, {"k": 1}, lambda tokens: tokens), (top_k, {"k": 3}, lambda tokens: 3 * tokens),
    (sparse, {"capacity": 1.0}, lambda tokens: 4 * round(tokens / 4)),
    (sparse, {"capacity": 2.0}, lambda tokens: 4 * round(2 * tokens / 4)),
    (sparse, {"capacity": 0.25}, lambda tokens: 4 * round(0.25 * tokens / 4)),
])  # fmt: skip
def test_macs_are_those_of_the_mlps_and_of_routing(name, convert, settings, computed):
    """Of so many slots, or pairs of a token and an expert."""
    dense = MODELS[name]()
    model, counted = convert(dense, layers=all_layers(dense), **settings), count(dense)
    now, expected = count(model, sites=[]), counted.total
    for site in find_mlps(dense):
        tokens = counted.tokens[site.name]
        units = computed(tokens)
        routing = 3 * units if convert is soft else 4  # logits, dispatch, combination; four gates
        macs = 2 * units * site.dim * site.hidden + routing * tokens * site.dim
        assert now.by_module[site.name] == macs
        expected += macs - counted.by_module[site.name]
    assert now.total == expected
    assert model(pixels_of(dense)).shape == (4, dense.num_classes)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("reduction", [0.03, 0.07])
@pytest.mark.parametrize(("convert", "experts"), [(soft, 2), (sparse, 4)])
def test_a_budget_of_macs_is_met(name, reduction, convert, experts):
    dense, mixed = MODELS[name](), 3 if convert is soft else 0
    model = convert(dense, experts=experts, layers=all_layers(dense), macs_reduction=reduction)
    counted, found = count(dense), count(model, sites=[]).total
    each = [s.dim * (2 * s.hidden + mixed * counted.tokens[s.name]) for s in find_mlps(dense)]
    budget = (1 - reduction) * counted.total
    assert budget - experts * max(each) < found <= budget
    assert measure.macs(model)["macs"].iloc[-1] == found


def test_the_largest_saving_can_be_had():
    dense = toy_vit()
    saved = 1 - count(sparse(dense, macs_reduction=0.089), sites=[]).total / count(dense).total
    assert 0.089 <= saved < 0.09


@pytest.mark.parametrize("name", MODELS)
def test_upcycled_experts_are_the_dense_mlp(name):
    """One expert with one slot: all tokens get its MLP of what dispatch mixes."""
    dense = MODELS[name]()
    site = find_mlps(dense)[0]
    layer = site.module(soft(dense, experts=1, slots=1, layers=(0,)))
    x = torch.randn(2, 12, site.dim)
    slot = layer.router(x).dispatch.mT @ x
    torch.testing.assert_close(
        layer(x), site.module(dense)(slot).expand_as(x), atol=1e-5, rtol=1e-4
    )
    (several,) = site.module(soft(dense, layers=(0,))).groups
    assert (several.fc1_weight == site.module(dense).fc1.weight).all()


def test_fresh_experts_differ():
    (fresh,) = soft(toy_vit(), layers=(2,), initialisation="fresh").blocks[2].mlp.groups
    for weight in (fresh.fc1_weight, fresh.fc2_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert not torch.equal(weight[0], weight[1])
    assert not fresh.fc1_bias.any()
    assert not fresh.fc2_bias.any()


@pytest.mark.parametrize("convert", [soft, partial(soft, initialisation="fresh"), sparse])
def test_seeds_decide(convert):
    first, same, other = (convert(toy_vit(), seed=seed) for seed in (0, 0, 1))
    assert same_models(first, same)
    unlike = {n for n, t in first.state_dict().items() if not torch.equal(t, other.state_dict()[n])}
    assert unlike
    if convert is sparse:  # only the routers, whatever else is copied
        assert unlike == {"blocks.1.mlp.router.gate.weight"}
        std = sparse(toy_vit(), experts=64).blocks[1].mlp.router.gate.weight.std().item()
        assert std == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("convert", "settings"), [
    (top_k, {"k": 1}), (top_k, {"k": 2}), (top_k, {"k": 4}),
    (sparse, {"capacity": 4.0}), (sparse, {"capacity": 9.0}),
])  # fmt: skip
def test_the_start_is_the_dense_model_where_every_token_has_an_expert(name, convert, settings):
    dense, x = MODELS[name](), pixels_of(MODELS[name]())
    model = convert(dense, layers=all_layers(dense), **settings)
    torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)


def test_gates_that_are_not_renormalised_scale_the_output():
    dense = toy_vit(depth=1)
    layer = top_k(dense, layers=(0,), k=2, renormalise=False).blocks[0].mlp
    x = torch.randn(3, 17, 32)
    gates = torch.softmax(x @ layer.router.gate.weight.T, dim=-1).topk(2).values
    expected = gates.sum(dim=-1, keepdim=True) * dense.blocks[0].mlp(x)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("convert", "settings", "message"), [
    (soft, {"experts": 0}, "experts as a whole number"),
    (soft, {"slots": 0}, "slots as a whole number"),
    (soft, {"slots": 1, "macs_reduction": 0.1}, "slots or a MACs reduction"),
    (soft, {"macs_reduction": 28}, "0.28 means 28 %"),
    (soft, {"macs_reduction": 0.5}, r"at most \d+\.\d%; found 50.0%"),
    (soft, {"initialisation": "copied"}, "upcycled, fresh"),
    (soft, {"drop": 1.0}, "drop as a number at least 0 and below 1"),
    (soft, {"layers": (9,)}, "layers between 0 and 2"),
    (top_k, {"macs_reduction": 0.2}, "plain upcycling never reduces MACs"),
    (top_k, {"capacity": 1.0}, "router='expert_choice' with a capacity"),
    (top_k, {"k": 5}, "at most 4 experts"), (top_k, {"k": 0}, "k as a whole number"),
    (sparse, {"capacity": 1.0, "macs_reduction": 0.2}, "capacity or a MACs reduction"),
    (sparse, {"macs_reduction": 28}, "0.28 means 28 %"),
    (sparse, {"macs_reduction": 0.5}, r"at most 8\.9%; found 50\.0%"),
    (sparse, {"router": "hash"}, "expert_choice, top_k"),
    (sparse, {"experts": 0}, "experts as a whole number"),
    (sparse, {"capacity": 0.0}, "capacity as a number above 0"),
    (sparse, {"layers": ()}, "layers between 0 and 2"),
])  # fmt: skip
def test_impossible_requests_are_refused(convert, settings, message):
    with pytest.raises(MoeeError, match=message):
        convert(toy_vit(), **settings)
