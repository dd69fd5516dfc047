import copy
import math

import numpy as np
import pytest
import torch

from moee_analysis.models.capture import capture
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.kernels import Strategy
from moee_analysis.moe.layer import moe_layers, set_dispatch
from moee_analysis.training.distillation import (
    block_errors,
    blocks_to_compare,
    choice_loss,
    divergences,
    find_learners,
    nearest_experts,
    probabilities,
    straight_through,
    trainable_routers,
    watch_learners,
)
from tests.helpers.models import hooks_of, toy_kinds, toy_moe, toy_swin, toy_vit

X = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def slow_divergence(student, dense, temperature):
    total = 0.0
    p = [math.exp(v / temperature) for v in dense]
    q = [math.exp(v / temperature) for v in student]
    for a, b in zip(p, q, strict=True):
        total += a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_the_definition(temperature):
    student, dense = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1)).double()
    found = divergences(student, dense, temperature=temperature)
    wanted = [
        slow_divergence(s, d, temperature)
        for s, d in zip(student.tolist(), dense.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert divergences(dense, dense).abs().max() < 1e-6
    low = 30 * student.bfloat16(), 30 * dense.bfloat16()  # the softmax is of full precision
    assert torch.equal(divergences(*low), divergences(*(each.float() for each in low)))


def test_blocks_whose_patches_nothing_reads_are_not_compared():
    assert blocks_to_compare(toy_vit()) == ("blocks.0", "blocks.1")
    assert blocks_to_compare(toy_swin()) == ("layers.0.blocks.0", "layers.1.blocks.0")


def test_errors_of_blocks_are_relative_and_of_each_image():
    dense, student = toy_vit(), toy_moe(toy_vit())
    names = blocks_to_compare(dense)
    with capture(dense, names, "outputs") as wanted, capture(student, names, "outputs") as found:
        dense(X)
        student(X)
    errors = block_errors(found, wanted, 3)
    slow = [
        sum(
            float((found[n][i] - wanted[n][i]).square().sum() / wanted[n][i].square().sum())
            for n in names
        )
        / len(names)
        for i in range(3)
    ]
    assert errors.tolist() == pytest.approx(slow, rel=1e-5)
    assert block_errors(wanted, wanted, 3).tolist() == [0.0] * 3
    windows = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    off = windows.clone()
    off[2:4] *= 1.1  # the second image of three, in two windows
    errors = block_errors({"b": off}, {"b": windows}, 3)
    assert errors.tolist() == pytest.approx([0, 0.01, 0], abs=1e-6)


# Routers that learn


KINDS = {"alike": toy_moe, "kinds": toy_kinds}


@pytest.fixture(params=KINDS)
def model(request):
    model = KINDS[request.param](toy_vit())
    set_dispatch(model, "masked")
    return model


@pytest.fixture
def first(model):
    """Its first layer that can learn."""
    return find_learners(model)["blocks.0.mlp"]


def test_probabilities_are_highest_for_the_chosen_expert(model):
    x = torch.randn(3, 17, 32, generator=torch.Generator().manual_seed(1))
    for each in find_learners(model).values():
        p = probabilities(each.router, x[:, each.leading :])
        torch.testing.assert_close(p.sum(dim=1), torch.ones(len(p)))
        chosen = each.layer.router(x).reshape(3, 17)[:, each.leading :].flatten()
        assert torch.equal(p.argmax(dim=1) + each.first, chosen)


def test_layers_without_a_choice_learn_none():
    assert list(find_learners(toy_moe(toy_vit()))) == [f"blocks.{n}.mlp" for n in range(3)]
    assert not find_learners(toy_vit())
    assert not find_learners(toy_moe(toy_vit(), n_experts=1))


def test_straight_through_outputs_stay_and_routers_get_gradients(model):
    before, hooks = model(X), hooks_of(model)
    with trainable_routers(model), straight_through(model):
        out = model(X)
        torch.testing.assert_close(out, before, rtol=1e-4, atol=1e-5)
        model.forward_features(X).square().sum().backward()  # nothing else reads the last patches
        for each in find_learners(model).values():
            own = dict(each.router.named_parameters())
            assert own
            assert all(p.grad is not None and p.grad.abs().max() > 0 for p in own.values())
    assert hooks_of(model) == hooks


def test_the_gradient_is_that_of_a_gate_by_the_probability(model, first):
    """Against outputs that are multiplied by the probability itself."""
    layer, leading = first.layer, first.leading
    x = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(3))
    with trainable_routers(model):
        router_weight = next(first.router.parameters())
        with straight_through(model):
            (layer(x) * weights).sum().backward()
        found, router_weight.grad = router_weight.grad.clone(), None
        outputs = layer(x).detach() - layer.fc2.bias.detach()
        p = probabilities(first.router, x[:, leading:]).amax(dim=1).reshape(2, -1)
        (outputs[:, leading:] * p[..., None] * weights[:, leading:]).sum().backward()
        torch.testing.assert_close(router_weight.grad, found, rtol=1e-4, atol=1e-5)


def test_routers_are_buffers_again_afterwards_with_what_they_learned(model, first):
    names, router = list(model.state_dict()), first.router
    with pytest.raises(RuntimeError, match="broken"), trainable_routers(model):
        raise RuntimeError("broken")
    assert not list(router.parameters())
    with trainable_routers(model):
        assert sorted(model.state_dict()) == sorted(names)
        learned = next(router.parameters()).data.add_(1.0).clone()
    assert not list(router.parameters())
    assert torch.equal(next(router.buffers()), learned)
    assert list(model.state_dict()) == names


def test_the_nearest_expert_is_found_as_by_trying_each_alone(model):
    dense = toy_vit()
    with watch_learners(model) as seen:
        model(X)
    for site in find_mlps(dense):
        each, mlp = seen[site.name], site.module(dense)
        for token, found in zip(each.tokens, nearest_experts(each, mlp), strict=True):
            errors = []
            for expert in range(each.first, each.layer.n_experts):
                chosen = torch.full((1, 1), expert)
                y = each.layer.compute(token[None], chosen, Strategy("sorted"))
                errors.append(float((y - mlp(token[None])).square().sum()))
            assert found == np.argmin(errors)


def test_only_tokens_that_have_a_choice_are_seen():
    model = toy_kinds(toy_vit())
    with watch_learners(model) as seen, capture(model, ["blocks.0.mlp"]) as inputs:
        model(X)
    patches = inputs["blocks.0.mlp"][:, 1:].flatten(0, 1)
    assert torch.equal(seen["blocks.0.mlp"].tokens, patches)  # and not CLS


def test_the_auxiliary_task_is_learned_and_teaches_routers_alone(model):
    dense, before = toy_vit(), copy.deepcopy(model.state_dict())
    with trainable_routers(model), watch_learners(model) as seen:
        model.requires_grad_(requires_grad=True)
        own = [p for each in seen.values() for p in each.router.parameters()]
        optimizer = torch.optim.Adam(own, lr=0.05)
        losses = []
        for _ in range(30):
            model(X)
            loss = choice_loss(seen, dense)
            optimizer.zero_grad()
            loss.backward()
            assert moe_layers(model)[0].fc1.weight.grad is None
            optimizer.step()
            losses.append(loss.item())
        model.requires_grad_(requires_grad=False)
    assert losses[-1] < 0.8 * losses[0]
    changed = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert changed
    assert all(".router." in name for name in changed)
