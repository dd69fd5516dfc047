import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch.nn.parallel import DistributedDataParallel

from moee_analysis.models.fingerprints import identity
from moee_analysis.moe import autotune
from moee_analysis.moe.autotune import LITTLE, candidates
from moee_analysis.moe.kernels import Strategy
from moee_analysis.moe.layer import MoeMlp, moe_layers
from moee_analysis.moe.routers import CosineRouter
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN, EXPERTS = 64, 256, 24
WORTH = LITTLE // (2 * DIM * HIDDEN) + 1  # tokens that are worth measuring


@pytest.fixture
def layer(monkeypatch):
    monkeypatch.setattr(autotune, "ENOUGH", 1e-9)
    monkeypatch.setattr(autotune, "FEW", 0)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    experts = [np.sort(rng.permutation(HIDDEN)[:100]) for _ in range(EXPERTS - 1)]
    mlp = Mlp(DIM, HIDDEN).requires_grad_(requires_grad=False)
    router, every = CosineRouter(torch.randn(EXPERTS, DIM)), np.arange(HIDDEN)
    return MoeMlp(mlp, router, [*experts, every], np.full(EXPERTS, 1 / EXPERTS))


def test_the_fastest_of_all_strategies_is_chosen_and_says_why(layer):
    x = torch.randn(WORTH, DIM)
    layer(x)
    (choice,) = layer.choices.values()
    counts = (2, 4, 16, None)  # every number of groups that there can be
    expected = [Strategy("masked"), *(Strategy("sorted", count) for count in counts)]
    assert list(choice.seconds) == candidates(x, experts=EXPERTS) == expected
    assert choice.seconds[choice.strategy] == min(choice.seconds.values()) > 0
    assert choice.reason.startswith(f"fastest for {WORTH} tokens: masked ")
    assert "sorted, 16 groups" in choice.reason


def test_measuring_is_done_once_for_about_as_many_tokens_and_as_many_threads(layer, monkeypatch):
    outs = [layer(torch.ones(n, DIM)) for n in (WORTH, WORTH, WORTH + 1)]
    assert torch.equal(outs[0], outs[1])
    assert len(layer.choices) == 1
    layer(torch.ones(4 * WORTH, DIM))
    assert len(layer.choices) == 2
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    layer(torch.ones(WORTH, DIM))
    assert len(layer.choices) == 3
    layer.load_state_dict(layer.state_dict())  # perhaps of other lists
    assert not layer.choices


def test_few_batches_are_not_worth_measuring_but_by_those_who_time_a_model(layer, monkeypatch):
    monkeypatch.setattr(autotune, "FEW", 2)
    x = torch.randn(WORTH, DIM)
    outs = [layer(x), layer(x)]
    assert not layer.choices
    assert layer.choose_strategy(x[:9], layer.router(x[:9])).strategy == autotune.MASKED
    outs.append(layer(x))
    assert len(layer.choices) == 1
    torch.testing.assert_close(outs[0], outs[2])
    with autotune.measuring_at_once():
        layer(torch.randn(4 * WORTH, DIM))
    assert len(layer.choices) == 2
    assert autotune.is_early(1)


def test_a_model_whose_layers_are_measured_is_looked_at_without_a_trace(monkeypatch):
    monkeypatch.setattr(autotune, "LITTLE", 0)
    model = toy_moe(toy_vit())
    looked = [identity(model), identity(model)]
    assert looked[0] == looked[1]
    assert not any(layer.choices or layer._batches for layer in moe_layers(model).values())


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_choice_serves_inference_with_and_without_recording(layer, mode):
    with mode():
        layer(torch.randn(WORTH, DIM))
    assert layer(torch.randn(WORTH, DIM)).shape == (WORTH, DIM)


def test_neither_little_work_nor_training_is_measured(layer):
    layer(torch.randn(7, DIM))
    layer.requires_grad_()
    layer(torch.randn(WORTH, DIM)).sum().backward()
    assert not layer.choices
    assert layer.fc1.weight.grad.any()


def test_a_strategy_that_was_set_is_taken(layer):
    layer.strategy = Strategy("sorted", 3)
    x = torch.randn(WORTH, DIM)
    found = layer(x)
    assert not layer.choices
    assert torch.equal(found, layer.compute(x, layer.router(x), Strategy("sorted", 3)))


@pytest.fixture
def one_process(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
def test_distributed_training_has_the_gradients_of_plain_training():
    model = toy_moe(toy_vit(), layers={0, 2}).requires_grad_()
    x = torch.randn(4, 3, 32, 32)
    model(x).square().sum().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    DistributedDataParallel(model)(x).square().sum().backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, plain[name])
    assert plain["blocks.0.mlp.fc1.weight"].any()
