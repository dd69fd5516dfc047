from functools import partial

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch.utils.flop_counter import FlopCounterMode

from moee_analysis.baselines.common.exchange import ExpertMlps
from moee_analysis.baselines.sparse_upcycling import (
    ExpertChoiceRouter,
    Gate,
    RandomScores,
    SparseMlp,
    SparseUpcyclingConfig,
    TopKRouter,
    balance_loss,
    convert,
    importance_loss,
    prefer,
    watch_routers,
)
from moee_analysis.moe.layer import ExpertLayer
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit

DIM, HIDDEN, EXPERTS, IMAGES, TOKENS = 6, 10, 4, 3, 10

ROUTERS = {
    "top_k": lambda gate: TopKRouter(gate, k=2),
    "gates": lambda gate: TopKRouter(gate, k=1, renormalise=False),
    "expert_choice": lambda gate: ExpertChoiceRouter(gate, capacity=2.0),
    "little": lambda gate: ExpertChoiceRouter(gate, capacity=0.4, renormalise=False),
}


def choose_randomly(router, seed):
    return prefer(router, RandomScores(DIM, EXPERTS, seed=seed))


KINDS = {
    "own": lambda router: router,
    "random": lambda router: choose_randomly(router, 1),
    "constant": lambda router: prefer(router, router.constant_scores),
}


def gate():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, DIM, generator=generator, dtype=torch.float64)
    return Gate(weight)


def made(name):
    """MLPs of random weights, and the layer that has them as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(DIM, HIDDEN).double() for _ in range(EXPERTS)]
    return mlps, SparseMlp(ROUTERS[name](gate()), ExpertMlps(mlps, mlps[0].act)).eval()


def tokens(*shape):
    shape = shape or (IMAGES, TOKENS, DIM)
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def masked(mlps, layer, x):
    """All tokens through all experts; what the router does not say is multiplied by zero."""
    flat, routed = x.flatten(0, -2), layer.router(x)
    weights = x.new_zeros(len(flat), EXPERTS)
    weights[routed.tokens, routed.experts] = routed.weights
    outputs = torch.stack([mlp(flat) for mlp in mlps], dim=1)
    return (weights[..., None] * outputs).sum(1).reshape(x.shape)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(IMAGES, TOKENS, DIM), (2, 3, 4, DIM)])
def test_outputs_and_gradients_are_those_of_all_experts_masked(name, kind, shape):
    mlps, layer = made(name)
    layer.router = KINDS[kind](layer.router)
    found, expected = layer(tokens(*shape)), masked(mlps, layer, tokens(*shape))
    torch.testing.assert_close(found, expected)
    gates = []
    for outputs in (found, expected):
        layer.router.zero_grad()
        outputs.square().sum().backward()
        gates.append(layer.router.gate.weight.grad.clone())
    torch.testing.assert_close(*gates, atol=1e-9, rtol=1e-6)
    for e, mlp in enumerate(mlps):
        torch.testing.assert_close(layer.experts.fc1_weight.grad[e], mlp.fc1.weight.grad)


@pytest.mark.parametrize(("name", "pairs"), [
    ("top_k", 2 * IMAGES * TOKENS), ("gates", IMAGES * TOKENS),
    ("expert_choice", 2 * IMAGES * TOKENS), ("little", IMAGES * EXPERTS),
])  # fmt: skip
def test_only_routed_pairs_are_computed_and_usage_counts_the_tokens_of_each_expert(name, pairs):
    _, layer = made(name)
    assert isinstance(layer, ExpertLayer)
    x = tokens()
    for router in (layer.router, layer.random_router(0), layer.constant_router()):
        layer.router = router
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            layer(x)
        macs = pairs * 2 * DIM * HIDDEN + IMAGES * TOKENS * DIM * EXPERTS
        assert counter.get_total_flops() == 2 * macs
        chosen = router(x).experts.tolist()
        usage = layer.usage(router(x))
        assert usage.dtype == torch.float64
        assert usage.tolist() == [chosen.count(e) for e in range(EXPERTS)]
        assert len(chosen) == pairs


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_keep_their_precision_under_autocast(name):
    layer, x = made(name)[1].float(), tokens().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, routed = layer(x), layer.router(x)
    assert (found.dtype, routed.weights.dtype) == (torch.bfloat16, torch.float32)
    assert found.isfinite().all()


def weights_of(routed, *, images=IMAGES, count=TOKENS):
    """Weight of every expert in every token, (images, tokens, experts); 0 where they do not meet.

    The pairs of an expert stand beside each other, and none is there twice.
    """
    assert (routed.experts.diff() >= 0).all()
    pairs = routed.tokens * EXPERTS + routed.experts
    assert len(pairs.unique()) == len(pairs) == len(routed.weights)
    table = torch.zeros(images * count * EXPERTS, dtype=torch.float64)
    table[pairs] = routed.weights.detach()
    return table.view(images, count, EXPERTS)


def top_k_loop(gates, router):
    """Weights by the definition, token after token."""
    found = torch.zeros_like(gates)
    for token, each in enumerate(gates):
        best = each.argsort(descending=True)[: router.k]
        found[token, best] = each[best] / (each[best].sum() if router.renormalise else 1)
    return found


def expert_choice_loop(gates, router):
    """Weights by the definition, expert after expert."""
    found = torch.zeros_like(gates)
    taken = min(len(gates), max(1, round(router.capacity * len(gates) / EXPERTS)))
    for expert in range(EXPERTS):
        best = gates[:, expert].argsort(descending=True)[:taken]
        found[best, expert] = gates[best, expert]
    if router.renormalise:
        found = (found / found.sum(1, keepdim=True)).nan_to_num(0)
    return found


@pytest.mark.parametrize(("router", "loop"), [
    *[(partial(TopKRouter, k=k), top_k_loop) for k in (1, 2, 4)],
    *[(partial(ExpertChoiceRouter, capacity=c), expert_choice_loop)
      for c in (0.1, 0.5, 1.0, 2.0, 4.0, 9.0)],
])  # fmt: skip
@pytest.mark.parametrize("renormalise", [True, False])
def test_routers_equal_loops_over_tokens_or_experts(router, loop, renormalise):
    made = router(gate(), renormalise=renormalise)
    gates = (tokens() @ made.gate.weight.detach().T).softmax(2)
    expected = torch.stack([loop(of_image, made) for of_image in gates])
    torch.testing.assert_close(weights_of(made(tokens())), expected)


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_images_are_routed_by_themselves(name, kind):
    router, x = KINDS[kind](ROUTERS[name](gate())), tokens()
    alone = weights_of(router(x[1:2]), images=1)
    torch.testing.assert_close(weights_of(router(x))[1:2], alone)


@pytest.mark.parametrize("name", ["top_k", "gates", "little"])
def test_random_routing_changes_who_meets_evenly_and_nothing_else(name):
    router, x = ROUTERS[name](gate()), tokens(IMAGES, 1000, DIM)
    own, other = router(x), choose_randomly(router, 0)(x)
    torch.testing.assert_close(other.weights.sort().values, own.weights.sort().values)
    shares = torch.bincount(other.experts, minlength=EXPERTS) / len(own.tokens)
    torch.testing.assert_close(shares, torch.full((EXPERTS,), 1 / EXPERTS), atol=0.03, rtol=0)
    own, other = (weights_of(each, count=1000) != 0 for each in (own, other))
    expected = own.double().mean() * other.double().mean()
    assert (own & other).double().mean().item() == pytest.approx(expected.item(), rel=0.25)


@pytest.mark.parametrize("name", ROUTERS)
def test_random_routing_is_a_function_of_a_tokens_content_and_the_seed(name):
    router, x = ROUTERS[name](gate()), tokens()
    found = [weights_of(choose_randomly(router, seed)(x)) for seed in (0, 0, 1)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
    assert not torch.equal(found[0], found[2])
    moved = weights_of(choose_randomly(router, 0)(x.flip(1)))
    torch.testing.assert_close(moved, found[0].flip(1))


@pytest.mark.parametrize("capacity", [0.4, 2.0, 4.0])
def test_constant_routing_is_by_places_or_the_same_for_all(capacity):
    met = weights_of(KINDS["constant"](TopKRouter(gate(), k=2))(tokens())) != 0
    assert (met == torch.tensor([True, True, False, False])).all()
    router = ExpertChoiceRouter(gate(), capacity=capacity)
    met = weights_of(KINDS["constant"](router)(tokens())) != 0
    assert (met == met[0]).all()
    each = met[0].sum(1)
    assert each.double().mean().item() == pytest.approx(capacity)
    assert each.max() - each.min() <= 1


def test_the_loss_is_the_cv_of_summed_gates():
    logits = np.random.default_rng(0).normal(size=(IMAGES, TOKENS, EXPERTS))
    sums = (np.exp(logits) / np.exp(logits).sum(axis=2, keepdims=True)).sum(axis=1)
    expected = np.mean((sums.std(axis=1) / sums.mean(axis=1)) ** 2)
    assert importance_loss(torch.from_numpy(logits)).item() == pytest.approx(expected)


def test_the_routers_of_a_model_are_watched_and_their_losses_summed():
    config = SparseUpcyclingConfig(experts=EXPERTS, router="top_k", k=1)
    model = convert(toy_vit(), toy_images(1), config).train()
    hooks = hooks_of(model)
    with watch_routers(model) as routed:
        model(next(toy_images(6).batches(toy_vit())))
    (last,) = routed.values()
    torch.testing.assert_close(balance_loss(routed), importance_loss(last.logits))
    assert balance_loss(routed | {None: last}) == 2 * balance_loss(routed)
    assert list(routed) == [model.blocks[1].mlp.router]
    assert hooks_of(model) == hooks
