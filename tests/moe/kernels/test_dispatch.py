"""Every way of computing a layer gives what a loop over tokens and dense weights gives."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.layers import Mlp

from moee_analysis.errors import MoeeError
from moee_analysis.moe.kernels.dispatch import BLOCK, Way
from moee_analysis.moe.kernels.group_mlps import FEW, MOST
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, set_dispatch
from moee_analysis.moe.routers import CosineRouter, TokenKindRouter
from moee_analysis.utils.matmul import KERNELS
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN, EXPERTS = 8, 24, 6
WAYS = [
    Way("masked"), Way("sorted"), Way("sorted", 1), Way("sorted", 2), Way("sorted", 4),
    Way("grouped_mm"), Way("grouped_mm", 1), Way("grouped_mm", 3),
    Way("masked", None, "onednn"), Way("sorted", None, "onednn"), Way("sorted", 2, "onednn"),
]  # fmt: skip
READOUTS = ["dense", "shift", "shared", "own"]


class TopTwo(CosineRouter):
    """Two experts for each token."""

    def forward(self, x):
        return (x.reshape(-1, x.shape[-1]) @ self.centres.T).topk(2, dim=1).indices


class ClsApart(TokenKindRouter):
    """The first token of an image has an expert of its own."""

    def __init__(self, centres):
        super().__init__((0,), CosineRouter(centres[1:].clone()), tokens=5)


def lists(kind, rng):
    if kind == "some empty":
        return [rng.permutation(HIDDEN)[: 5 * (e % 3)] for e in range(EXPERTS)]
    if kind == "all empty":
        return [np.array([], dtype=np.int64)] * EXPERTS
    if kind == "two lists":
        two = [rng.permutation(HIDDEN)[:9], rng.permutation(HIDDEN)[:13]]
        return [two[e % 2] for e in range(EXPERTS)]
    return [rng.permutation(HIDDEN)[: 3 + 3 * e] for e in range(EXPERTS)]


def readout_of(kind):
    weight = {"shared": (DIM, HIDDEN), "own": (EXPERTS, DIM, HIDDEN)}.get(kind)
    shift = None if kind == "dense" else torch.randn(EXPERTS, DIM)
    return Readout(None if weight is None else torch.randn(*weight), shift)


def made(kind="drawn", *, router=CosineRouter, readout="shift", bias=True):
    torch.manual_seed(0)
    experts = [np.sort(ids) for ids in lists(kind, np.random.default_rng(0))]
    mlp, out = Mlp(DIM, HIDDEN, bias=bias), readout_of(readout)
    shares = np.arange(1, EXPERTS + 1) / np.arange(1, EXPERTS + 1).sum()
    return mlp, MoeMlp(mlp, router(torch.randn(EXPERTS, DIM)), experts, shares, out), experts, out


def token_by_token(mlp, layer, experts, out, x):
    """The dense weights of the neurons of each token's experts, one token after the other."""
    found = []
    for token, chosen in zip(x.reshape(-1, DIM), layer.router(x).tolist(), strict=True):
        hidden, total = mlp.act(mlp.fc1(token)), 0
        for expert in chosen:
            weight = mlp.fc2.weight if out.weight is None else out.weight
            weight = weight[expert] if weight.ndim == 3 else weight
            total = total + weight[:, experts[expert]] @ hidden[experts[expert]]
            total = total if out.shift is None else total + out.shift[expert]
        found.append(total if mlp.fc2.bias is None else total + mlp.fc2.bias)
    return torch.stack(found).reshape(x.shape)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize(("kind", "router"), [
    ("drawn", CosineRouter),
    ("some empty", TopTwo),
    ("all empty", CosineRouter),
    ("two lists", ClsApart),
])  # fmt: skip
def test_all_ways_equal_a_loop_over_tokens(way, readout, kind, router):
    mlp, layer, experts, out = made(kind, router=router, readout=readout)
    x = torch.randn(7, 5, DIM)
    layer.way = way
    with torch.no_grad():
        torch.testing.assert_close(layer(x), token_by_token(mlp, layer, experts, out, x))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_biases_may_be_missing(way):
    mlp, layer, experts, out = made(bias=False, readout="dense")
    x = torch.randn(9, DIM)
    layer.way = way
    with torch.no_grad():
        torch.testing.assert_close(layer(x), token_by_token(mlp, layer, experts, out, x))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("act", [torch.nn.Identity, torch.nn.Tanh, torch.nn.LeakyReLU])
def test_activations_that_are_never_silent_are_dropped_all_the_same(way, act):
    torch.manual_seed(0)
    mlp, experts = Mlp(DIM, HIDDEN, act_layer=act), lists("drawn", np.random.default_rng(0))
    experts = [np.sort(ids) for ids in experts]
    router, shares = CosineRouter(torch.randn(EXPERTS, DIM)), np.full(EXPERTS, 1 / EXPERTS)
    layer = MoeMlp(mlp, router, experts, shares)
    assert not layer.silent
    x = torch.randn(9, DIM)
    layer.way = way
    with torch.no_grad():
        torch.testing.assert_close(layer(x), token_by_token(mlp, layer, experts, Readout(), x))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_any_number_of_tokens_is_right_in_blocks(way, tokens):
    _, layer, _, _ = made()
    x = torch.randn(tokens, DIM)
    with torch.no_grad():
        parts = [layer(part) for part in x.split(7)] if tokens else [x]
        layer.way = way
        torch.testing.assert_close(layer(x), torch.cat(parts))


@pytest.mark.parametrize("way", [w for w in WAYS if w.name != "grouped_mm"], ids=str)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("router", [CosineRouter, TopTwo])
def test_gradients_of_all_ways_are_right(way, readout, router):
    _, layer, _, _ = made("some empty", router=router, readout=readout)
    layer.double().way = way
    names, values = zip(*layer.named_parameters(), strict=True)
    values = [value.detach().clone().requires_grad_() for value in values]
    x = torch.randn(6, DIM, dtype=torch.float64, requires_grad=True)

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_near_to_single_precision(way, dtype):
    _, layer, _, _ = made(readout="shift")
    x = torch.randn(60, DIM)
    layer.way = way
    with torch.inference_mode():
        chosen = layer.router(x)
        exact = layer(x)
        with torch.autocast("cpu", dtype=dtype):
            found = layer(x)
            same = (layer.router(x) == chosen)[:, 0]
    assert found.dtype == dtype
    assert same.float().mean() > 0.9  # at a lower precision a token may change its expert
    assert (found.float() - exact)[same].abs().max() < 0.05


@pytest.mark.parametrize("way", [w for w in WAYS if w.name != "grouped_mm"], ids=str)
def test_what_was_prepared_in_inference_serves_training(way):
    _, layer, _, _ = made()
    layer.way = way
    with torch.inference_mode():
        layer(torch.randn(20, DIM))
    layer(torch.randn(20, DIM)).sum().backward()
    assert layer.fc1.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_other_weights_and_lists_take_effect(way):
    _, layer, _, _ = made(readout="shift")
    other = made(readout="shift")[1]
    x = torch.randn(30, DIM)
    layer.way = other.way = way
    with torch.no_grad():
        layer(x)
        other.fc1.weight.mul_(2)
        other.neurons.copy_(other.neurons.flip(0))
        changed = copy.deepcopy(other.state_dict())
        layer.load_state_dict(changed)
        other.load_state_dict(changed)
        assert torch.equal(layer(x), other(x))
        layer.fc2.bias.add_(1)
        torch.testing.assert_close(layer(x), other(x) + 1)


def test_a_copy_and_another_precision_compute_by_themselves():
    _, layer, _, _ = made()
    x = torch.randn(30, DIM)
    layer.way = Way("sorted", 2)
    with torch.no_grad():
        before = layer(x)
        twin = copy.deepcopy(layer).double()
        torch.testing.assert_close(twin(x.double()).float(), before)
        twin.fc1.weight.zero_()
        assert torch.equal(layer(x), before)


def test_compiling_needs_one_graph_and_changes_nothing():
    _, layer, _, _ = made(router=ClsApart)
    x = torch.randn(4, 5, DIM)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("readout", READOUTS)
def test_an_exported_layer_takes_any_number_of_images(readout, tmp_path):
    _, layer, _, _ = made(router=ClsApart, readout=readout)
    layer.eval().requires_grad_(requires_grad=False)
    x = torch.randn(4, 5, DIM)
    exported = torch.export.export(
        layer, (x,), dynamic_shapes={"x": {0: torch.export.Dim.AUTO}}, strict=False
    )
    torch.export.save(exported, tmp_path / "layer.pt2")
    again = torch.export.load(tmp_path / "layer.pt2").module()
    more = torch.randn(9, 5, DIM)
    torch.testing.assert_close(again(more), layer(more))


def test_every_layer_of_a_model_is_set_and_set_back():
    model = toy_moe(toy_vit(), layers={0, 2})
    set_dispatch(model, "sorted", groups=2)
    assert {layer.way for layer in moe_layers(model).values()} == {Way("sorted", 2)}
    set_dispatch(model, "masked", kernel="onednn")
    assert {str(layer.way) for layer in moe_layers(model).values()} == {"masked, oneDNN"}
    set_dispatch(model, "auto")
    assert {layer.way for layer in moe_layers(model).values()} == {None}


@pytest.mark.parametrize(
    ("way", "settings"),
    [
        ("quick", {}), ("auto", {"groups": 2}), ("masked", {"groups": 2}),
        ("sorted", {"groups": 0}), ("sorted", {"kernel": "quick"}),
    ],
)  # fmt: skip
def test_other_ways_are_refused(way, settings):
    with pytest.raises(MoeeError):
        set_dispatch(toy_moe(toy_vit(), layers={0}), way, **settings)


# What is kept of the weights from one call to the next


def halved_and_back(layer):
    layer.bfloat16().float()


def stepped(layer):
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(torch.randn(20, DIM)).square().sum().backward()
    optimizer.step()


def put_elsewhere(layer):
    layer.fc2.weight.data = 2 * layer.fc2.weight.data


def written_to(layer):
    with torch.inference_mode():
        layer.fc1.weight.mul_(2)
        layer.shift.add_(1)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("change", [halved_and_back, stepped, put_elsewhere, written_to])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_weights_that_change_between_calls_take_effect(way, change, mode):
    _, layer, _, _ = made()
    twin = copy.deepcopy(layer)
    layer.way = twin.way = way
    x = torch.randn(30, DIM)
    with mode():
        before = layer(x)
    change(layer)
    twin.load_state_dict(layer.state_dict())
    with mode():
        torch.testing.assert_close(layer(x), twin(x))
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("groups", [1, 2, None])
def test_weights_that_are_not_kept_give_the_same(groups):
    _, layer, _, _ = made()
    x = torch.randn(FEW + 1, DIM)
    with torch.no_grad():
        layer.way = Way("masked")
        before = layer(x)
        for kernel in KERNELS:
            layer.way = Way("sorted", groups, kernel)
            torch.testing.assert_close(layer(x), before)


def kept_neurons(layer):
    """Neurons that are kept laid out, of all ways together."""
    return sum(len(mlp.inward.weight) for parts in layer.laid_out for mlp in parts)


@pytest.mark.parametrize("groups", [1, 2, 3, None])
def test_only_so_many_neurons_are_kept_and_only_for_few_tokens(groups):
    _, layer, _, _ = made()
    layer.way = Way("sorted", groups)
    with torch.no_grad():
        layer(torch.randn(FEW + 1, DIM))
        assert not layer.laid_out
        layer(torch.randn(9, DIM))
    neurons = layer.layout(groups).neurons
    assert kept_neurons(layer) == (neurons if neurons <= MOST * layer.fc1.out_features else 0)


def test_nothing_is_kept_in_training_or_of_weights_that_tell_no_change():
    _, layer, _, _ = made()
    layer.way = Way("sorted", 1)
    layer(torch.randn(9, DIM))
    with torch.inference_mode():
        other = copy.deepcopy(layer)
        other(torch.randn(9, DIM))
    assert not layer.laid_out
    assert not other.laid_out
