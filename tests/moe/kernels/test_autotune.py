from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch.nn.parallel import DistributedDataParallel

from moee_analysis.moe.kernels import autotune as tuning
from moee_analysis.moe.kernels.autotune import LITTLE, candidates
from moee_analysis.moe.kernels.dispatch import Way
from moee_analysis.moe.layer import MoeMlp
from moee_analysis.moe.routers import CosineRouter
from moee_analysis.utils import matmul as products
from tests.helpers.models import toy_moe, toy_vit

DIM, HIDDEN, EXPERTS = 64, 256, 24
ENOUGH = LITTLE // (2 * DIM * HIDDEN) + 1  # tokens that are worth measuring


@pytest.fixture
def layer():
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    experts = [np.sort(rng.permutation(HIDDEN)[:100]) for _ in range(EXPERTS - 1)]
    mlp = Mlp(DIM, HIDDEN).requires_grad_(requires_grad=False)
    router, every = CosineRouter(torch.randn(EXPERTS, DIM)), np.arange(HIDDEN)
    return MoeMlp(mlp, router, [*experts, every], np.full(EXPERTS, 1 / EXPERTS))


def only_choice(layer):
    (choice,) = layer.choices.values()
    return choice


def test_the_fastest_of_all_ways_is_chosen_and_says_why(layer):
    x = torch.randn(ENOUGH, DIM)
    layer(x)
    choice = only_choice(layer)
    assert set(choice.seconds) == set(candidates(layer, x))
    assert choice.seconds[choice.way] == min(choice.seconds.values()) > 0
    assert choice.reason.startswith(f"fastest for {ENOUGH} tokens: masked ")
    assert "sorted, 16 groups" in choice.reason


def test_every_number_of_groups_is_tried_that_there_can_be(layer):
    ways = candidates(layer, torch.zeros(1, DIM))
    counts = (2, 4, 16, None)
    assert ways == [Way("masked"), *(Way("sorted", count) for count in counts)]


def test_onednn_takes_part_where_it_is_fast_and_is_told(layer, monkeypatch):
    monkeypatch.setattr(products, "onednn_speed", lambda threads: 2.0)
    monkeypatch.setattr(tuning, "onednn_speed", lambda threads: 2.0)
    x = torch.randn(ENOUGH, DIM)
    layer(x)  # with gradients, which oneDNN does not know
    assert {way.kernel for way in only_choice(layer).seconds} == {"blas"}
    with torch.no_grad():
        if not products.onednn_takes(x):
            pytest.skip("this torch has no oneDNN")
        torch.testing.assert_close(layer(x), Way("masked")(layer, x, layer.router(x)))
    _, choice = layer.choices.values()
    assert {way.kernel for way in choice.seconds} == {"onednn"}
    assert choice.reason.endswith("oneDNN multiplies 2 times as fast as BLAS here")


def test_measuring_is_done_once_for_about_as_many_tokens(layer):
    outs = [layer(torch.ones(n, DIM)) for n in (ENOUGH, ENOUGH, ENOUGH + 1)]
    assert torch.equal(outs[0], outs[1])
    assert len(layer.choices) == 1
    layer(torch.ones(4 * ENOUGH, DIM))
    assert len(layer.choices) == 2


def test_measuring_is_repeated_with_other_threads(layer):
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            layer(torch.ones(ENOUGH, DIM))
    finally:
        torch.set_num_threads(before)
    assert len(layer.choices) == 2


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_a_choice_serves_inference_with_and_without_recording(layer, mode):
    with mode():
        layer(torch.randn(ENOUGH, DIM))
    assert layer(torch.randn(ENOUGH, DIM)).shape == (ENOUGH, DIM)


def test_little_work_is_not_measured(layer):
    layer(torch.randn(7, DIM))
    assert not layer.choices


def test_training_is_not_measured(layer):
    layer.requires_grad_()
    layer(torch.randn(ENOUGH, DIM)).sum().backward()
    assert not layer.choices
    assert layer.fc1.weight.grad.any()


def test_a_way_that_was_set_is_taken(layer):
    layer.way = Way("sorted", 3)
    x = torch.randn(ENOUGH, DIM)
    found = layer(x)
    assert not layer.choices
    assert torch.equal(found, Way("sorted", 3)(layer, x, layer.router(x)))


def test_loading_weights_forgets_the_choices(layer):
    layer(torch.randn(ENOUGH, DIM))
    layer.load_state_dict(layer.state_dict())
    assert not layer.choices


def test_a_model_exports_and_compiles_as_it_computes(tmp_path):
    model = toy_moe(toy_vit(), layers={0, 2})
    x = torch.randn(2, 3, 32, 32)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("images")},))
    torch.export.save(exported, tmp_path / "model.pt2")
    more = torch.randn(5, 3, 32, 32)
    again = torch.export.load(tmp_path / "model.pt2").module()
    torch.testing.assert_close(again(more), model(more))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


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
