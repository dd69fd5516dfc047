"""Every strategy gives what a loop over tokens and dense weights gives."""

import copy

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.moe.kernels import BLOCK, Strategy
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, set_dispatch
from moee_analysis.moe.routers import CosineRouter, TokenKindRouter
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN, EXPERTS = 8, 24, 6
STRATEGIES = [
    Strategy("masked"), *(Strategy("sorted", groups) for groups in (None, 1, 2, 4)),
    *(Strategy("grouped_mm", groups) for groups in (None, 1, 3)),
]  # fmt: skip
TRAINABLE = [each for each in STRATEGIES if each.name != "grouped_mm"]
READOUTS = ["dense", "shift", "refitted"]
NONE = np.array([], dtype=np.int64)
every = pytest.mark.parametrize("strategy", STRATEGIES, ids=str)


class TopTwo(CosineRouter):
    """Two experts for each token."""

    def forward(self, x):
        return self.scores(x).topk(2, dim=1).indices


class ClsApart(TokenKindRouter):
    """The first token of an image has an expert of its own."""

    def __init__(self, centres):
        super().__init__((0,), CosineRouter(centres[1:].clone()), tokens=5)


def lists(kind):
    rng = np.random.default_rng(0)
    draw = lambda size: np.sort(rng.permutation(HIDDEN)[:size])  # noqa: E731
    return {
        "random": lambda: [draw(3 + 3 * e) for e in range(EXPERTS)],
        "some empty": lambda: [draw(5 * (e % 3)) for e in range(EXPERTS)],
        "all empty": lambda: [NONE] * EXPERTS,
        "two lists": lambda: [draw(9), draw(13)] * (EXPERTS // 2),
        "disjoint": lambda: [np.arange(e, HIDDEN, EXPERTS)[: e % 4] for e in range(EXPERTS)],
    }[kind]()


def build(kind="random", *, router=CosineRouter, readout="shift", bias=True, act=nn.GELU):
    torch.manual_seed(0)
    experts, mlp = lists(kind), Mlp(DIM, HIDDEN, bias=bias, act_layer=act)
    readout = Readout(
        torch.randn(DIM, HIDDEN) if readout == "refitted" else None,
        None if readout == "dense" else torch.randn(EXPERTS, DIM),
    )
    shares = np.arange(1, EXPERTS + 1) / np.arange(1, EXPERTS + 1).sum()
    layer = MoeMlp(mlp, router(torch.randn(EXPERTS, DIM)), experts, shares, readout)
    return mlp, layer, experts, readout


def token_by_token(mlp, layer, experts, readout, x):
    """The dense weights of the neurons of each token's experts, one token after the other."""
    found = []
    w2 = (mlp.fc2.weight if readout.weight is None else readout.weight).to(x)
    for token, chosen in zip(x.reshape(-1, DIM), layer.router(x).tolist(), strict=True):
        hidden = mlp.act(mlp.fc1(token))
        total = torch.zeros(DIM).to(x) if mlp.fc2.bias is None else mlp.fc2.bias
        for expert in chosen:
            total = total + w2[:, experts[expert]] @ hidden[experts[expert]]
            total = total if readout.shift is None else total + readout.shift[expert].to(x)
        found.append(total)
    return torch.stack(found).reshape(x.shape)


@every
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("case", [  # activations that are never silent are dropped all the same
    ("random", CosineRouter, (9, DIM), True, nn.GELU),
    ("random", TopTwo, (2, 3, 4, DIM), False, nn.Tanh),
    ("some empty", TopTwo, (7, 5, DIM), True, nn.LeakyReLU),
    ("all empty", CosineRouter, (7, 5, DIM), False, nn.GELU),
    ("two lists", ClsApart, (7, 5, DIM), True, nn.GELU),
    ("disjoint", CosineRouter, (2, 3, 4, DIM), False, nn.Identity),
])  # fmt: skip
def test_all_strategies_equal_a_loop_over_tokens(strategy, readout, case):
    kind, router, shape, bias, act = case
    mlp, layer, *given = build(kind, router=router, readout=readout, bias=bias, act=act)
    dtype = torch.float32 if strategy.name == "grouped_mm" else torch.float64
    x = torch.randn(shape, dtype=dtype)
    layer.strategy = strategy
    with torch.no_grad():
        found = layer.to(dtype)(x)
        torch.testing.assert_close(found, token_by_token(mlp.to(dtype), layer, *given, x))


@every
@pytest.mark.parametrize("tokens", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
def test_any_number_of_tokens_is_right_in_blocks(strategy, tokens):
    layer = build()[1]
    x = torch.randn(tokens, DIM)
    with torch.no_grad():
        parts = [layer(part) for part in x.split(100)]
        layer.strategy = strategy
        torch.testing.assert_close(layer(x), torch.cat(parts))


@pytest.mark.parametrize("strategy", TRAINABLE, ids=str)
@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("router", [CosineRouter, TopTwo, ClsApart])
def test_gradients_are_those_of_the_loop(strategy, readout, router):
    mlp, layer, experts, given = build("some empty", router=router, readout=readout)
    leaves = [t if t is None else t.double().requires_grad_() for t in vars(given).values()]
    layer.double().strategy, x = strategy, torch.randn(3, 5, DIM, dtype=torch.float64)
    outputs, inputs = [], [x.clone().requires_grad_() for _ in range(2)]
    outputs.append(layer(inputs[0]))
    outputs.append(token_by_token(mlp.double(), layer, experts, Readout(*leaves), inputs[1]))
    for output in outputs:
        (output * torch.arange(output.numel()).reshape(output.shape)).sum().backward()
    w2 = mlp.fc2.weight if leaves[0] is None else leaves[0]
    expected = [mlp.fc1.weight.grad[layer.kept], mlp.fc1.bias.grad[layer.kept]]
    expected += [w2.grad[:, layer.kept], mlp.fc2.bias.grad, inputs[1].grad]
    found = [each.grad for each in (*layer.fc1.parameters(), *layer.fc2.parameters(), inputs[0])]
    if layer.shift is not None:
        expected, found = [*expected, leaves[1].grad], [*found, layer.shift.grad]
    torch.testing.assert_close(found, expected)


@every
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "some empty", "all empty"])
def test_mixed_precision_is_near_to_single_precision(strategy, dtype, kind):
    layer = build(kind)[1]
    x = torch.randn(60, DIM)
    layer.strategy = strategy
    with torch.inference_mode():
        chosen, exact = layer.router(x), layer(x)
        with torch.autocast("cpu", dtype=dtype):
            found = layer(x)
            same = (layer.router(x) == chosen)[:, 0]
    assert found.dtype == dtype
    assert same.float().mean() > 0.9  # at a lower precision a token may change its expert
    assert (found.float() - exact)[same].abs().max() < 0.05
    assert layer.to(dtype)(x.to(dtype)).dtype == dtype


def scale_data(layer):
    layer.fc1.weight.data.mul_(2)


def train_a_step(layer):
    layer(torch.randn(20, DIM)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def exchange_lists(layer):
    state = layer.state_dict()
    state["neurons"] = state["neurons"].flip(0)
    layer.load_state_dict(state)


@every
@pytest.mark.parametrize("change", [scale_data, train_a_step, exchange_lists])
def test_weights_and_lists_that_change_between_calls_take_effect(strategy, change):
    layer, x = build()[1], torch.randn(30, DIM)
    layer.strategy = strategy
    with torch.inference_mode():
        before = layer(x)
    if strategy not in TRAINABLE and change is train_a_step:
        layer.strategy = Strategy("masked")
    change(layer)  # what was prepared in inference serves training
    layer.strategy, twin = strategy, build()[1]
    twin.load_state_dict(layer.state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), twin(x))
        assert not torch.equal(layer(x), before)


def test_a_copy_and_another_precision_compute_by_themselves():
    layer, x = build()[1], torch.randn(30, DIM)
    layer.strategy = Strategy("sorted", 2)
    with torch.no_grad():
        before = layer(x)
        twin = copy.deepcopy(layer).double()
        torch.testing.assert_close(twin(x.double()).float(), before)
        twin.fc1.weight.zero_()
        assert torch.equal(layer(x), before)


def test_every_layer_of_a_model_is_set_and_set_back():
    model = toy_moe(toy_vit(), layers={0, 2})
    set_dispatch(model, "sorted", groups=2)
    assert {str(layer.strategy) for layer in moe_layers(model).values()} == {"sorted, 2 groups"}
    set_dispatch(model, "auto")
    assert {layer.strategy for layer in moe_layers(model).values()} == {None}


@pytest.mark.parametrize(("strategy", "groups", "named"), [
    ("fastest", None, "auto, masked, sorted, grouped_mm"),
    ("sorted", 0, "one group or more"),
    ("masked", 2, "a strategy with groups"),
    ("auto", 2, "a strategy with groups"),
])  # fmt: skip
def test_other_strategies_and_groups_are_refused(strategy, groups, named):
    with pytest.raises(MoeeError, match=named):
        set_dispatch(toy_moe(toy_vit(), layers={0}), strategy, groups=groups)
