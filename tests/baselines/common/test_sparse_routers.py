from __future__ import annotations

import pytest
import torch

from moee_analysis.baselines.common.sparse_routers import ExpertChoiceRouter, Gate, TopKRouter

DIM, EXPERTS, IMAGES, TOKENS = 6, 4, 3, 10


def gate(*, noise=0.0):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(EXPERTS, DIM, generator=generator, dtype=torch.float64)
    return Gate(weight, noise=noise)


def tokens(images=IMAGES, count=TOKENS):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, count, DIM, generator=generator, dtype=torch.float64)


def weights_of(routed, *, images=IMAGES, count=TOKENS):
    """Weight of every expert in every token, (images, tokens, experts); 0 where they do not meet.

    No pair may be there twice.
    """
    table = torch.full((images * count, EXPERTS), torch.nan, dtype=torch.float64)
    for expert, token, weight in zip(
        routed.experts, routed.tokens, routed.weights.detach(), strict=True
    ):
        assert table[token, expert].isnan()
        table[token, expert] = weight
    return table.nan_to_num(0).view(images, count, EXPERTS)


def top_k_loop(x, router):
    """Weights by the definition, token after token; then what is beyond capacity is taken away."""
    wanted = torch.zeros(*x.shape[:2], EXPERTS, dtype=torch.float64)
    order = []  # choices of each image, all first ones before the second ones
    for image in range(len(x)):
        ranked = []
        for token in range(x.shape[1]):
            gates = (router.gate.weight.detach() @ x[image, token]).softmax(0)
            best = sorted(range(EXPERTS), key=lambda e: -gates[e])[: router.k]
            total = sum(gates[e] for e in best) if router.renormalise else 1
            for rank, expert in enumerate(best):
                wanted[image, token, expert] = gates[expert] / total
                ranked.append((rank, token, expert))
        order.append(sorted(ranked))
    if router.capacity is None:
        return wanted
    most = max(1, round(router.capacity * router.k * x.shape[1] / EXPERTS))
    for image, ranked in enumerate(order):
        taken = [0] * EXPERTS
        for _, token, expert in ranked:
            taken[expert] += 1
            if taken[expert] > most:
                wanted[image, token, expert] = 0
    return wanted


def expert_choice_loop(x, router):
    """Weights by the definition, expert after expert."""
    found = torch.zeros(*x.shape[:2], EXPERTS, dtype=torch.float64)
    taken = min(x.shape[1], max(1, round(router.capacity * x.shape[1] / EXPERTS)))
    for image in range(len(x)):
        gates = (x[image] @ router.gate.weight.detach().T).softmax(1)
        for expert in range(EXPERTS):
            best = sorted(range(x.shape[1]), key=lambda t: -gates[t, expert])[:taken]
            for token in best:
                found[image, token, expert] = gates[token, expert]
    if router.renormalise:
        found = (found / found.sum(2, keepdim=True)).nan_to_num(0)
    return found


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("capacity", [None, 0.5, 1.0])
def test_top_k_equals_a_loop_over_tokens(k, renormalise, capacity):
    router = TopKRouter(gate(), k=k, renormalise=renormalise, capacity=capacity)
    x = tokens()
    torch.testing.assert_close(weights_of(router(x)), top_k_loop(x, router))


@pytest.mark.parametrize("capacity", [0.1, 0.5, 1.0, 2.0, 4.0, 9.0])
@pytest.mark.parametrize("renormalise", [True, False])
def test_expert_choice_equals_a_loop_over_experts(capacity, renormalise):
    router = ExpertChoiceRouter(gate(), capacity=capacity, renormalise=renormalise)
    x = tokens()
    torch.testing.assert_close(weights_of(router(x)), expert_choice_loop(x, router))


ROUTERS = {
    "top_k": lambda **s: TopKRouter(gate(**s), k=2),
    "dropping": lambda **s: TopKRouter(gate(**s), k=2, capacity=0.7),
    "gates": lambda **s: TopKRouter(gate(**s), k=2, renormalise=False),
    "expert_choice": lambda **s: ExpertChoiceRouter(gate(**s), capacity=1.2),
    "little": lambda **s: ExpertChoiceRouter(gate(**s), capacity=0.4, renormalise=False),
}


@pytest.mark.parametrize("name", ROUTERS)
@pytest.mark.parametrize("kind", ["own", "random", "constant"])
def test_pairs_of_an_expert_stand_beside_each_other(name, kind):
    router = ROUTERS[name]()
    router = {"own": router, "random": router.random(0), "constant": router.constant()}[kind]
    routed = router(tokens())
    assert (routed.experts.diff() >= 0).all()
    assert len(routed.experts) == len(routed.tokens) == len(routed.weights)
    weights_of(routed)  # no pair is there twice


@pytest.mark.parametrize("name", ROUTERS)
def test_images_are_routed_by_themselves(name):
    router, x = ROUTERS[name](), tokens()
    for kind in (router, router.random(3), router.constant()):
        alone = weights_of(kind(x[1:2]), images=1)
        torch.testing.assert_close(weights_of(kind(x))[1:2], alone)


@pytest.mark.parametrize("name", ["top_k", "gates", "little"])
def test_random_routing_changes_who_meets_and_nothing_else(name):
    router, x = ROUTERS[name](), tokens(count=200)
    own, other = router(x), router.random(0)(x)
    assert len(own.tokens) == len(other.tokens)
    torch.testing.assert_close(other.weights.sort().values, own.weights.sort().values)
    own, other = (weights_of(each, count=200) != 0 for each in (own, other))
    expected = own.double().mean() * other.double().mean()
    assert (own & other).double().mean().item() == pytest.approx(expected.item(), rel=0.25)


@pytest.mark.parametrize("name", ROUTERS)
def test_random_routing_can_be_repeated_and_depends_on_the_seed(name):
    router, x = ROUTERS[name](), tokens()
    first, again, other = (weights_of(router.random(seed)(x)) for seed in (0, 0, 1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert not torch.equal(first, other)


def test_random_routing_is_a_function_of_a_tokens_content():
    router, x = ROUTERS["top_k"]().random(0), tokens()
    moved = weights_of(router(x.flip(1)))
    torch.testing.assert_close(moved, weights_of(router(x)).flip(1))


@pytest.mark.parametrize("k", [1, 2])
def test_random_routing_is_even(k):
    routed = TopKRouter(gate(), k=k).random(0)(tokens(count=2000))
    shares = torch.bincount(routed.experts, minlength=EXPERTS) / (IMAGES * 2000)
    torch.testing.assert_close(shares, torch.full((EXPERTS,), k / EXPERTS), atol=0.03, rtol=0)


def test_constant_routing_has_the_same_experts_for_all_tokens():
    met = weights_of(TopKRouter(gate(), k=2).constant()(tokens())) != 0
    assert (met == torch.tensor([True, True, False, False])).all()


@pytest.mark.parametrize(("capacity", "experts_of_a_token"), [(0.4, 0.4), (2.0, 2.0), (4.0, 4.0)])
def test_constant_expert_choice_deals_tokens_by_their_places(capacity, experts_of_a_token):
    router = ExpertChoiceRouter(gate(), capacity=capacity)
    met = weights_of(router.constant()(tokens())) != 0
    assert (met == met[0]).all()
    each = met[0].sum(1)
    assert each.double().mean().item() == pytest.approx(experts_of_a_token)
    assert each.max() - each.min() <= 1


@pytest.mark.parametrize("name", ROUTERS)
def test_noise_is_added_in_training_only(name):
    noisy, x = ROUTERS[name](noise=0.5).eval(), tokens()
    routed = noisy(x)
    assert torch.equal(routed.noisy, routed.logits)
    torch.testing.assert_close(weights_of(routed), weights_of(ROUTERS[name]()(x)))
    routed = noisy.train()(tokens(count=5000))
    assert (routed.noisy - routed.logits).std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("name", ROUTERS)
def test_gates_learn(name):
    router = ROUTERS[name]()
    routed = router(tokens())
    (routed.weights * routed.experts).sum().backward()
    assert (router.gate.weight.grad != 0).any()
