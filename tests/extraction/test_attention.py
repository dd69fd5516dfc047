import copy
from itertools import combinations, product

import numpy as np
import pytest
import torch
from timm.layers import Attention

from moee_analysis.baselines.controls import randomly_routed, statically_pruned
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import attention as attentions
from moee_analysis.extraction.attention import Modes, attention_modes, gains, plan_attentions
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.attention import (
    Factors,
    Reduction,
    find_attentions,
    low_rank,
    plain_attentions,
    reduced_attentions,
)
from moee_analysis.models.macs import count, count_parameters, moe_macs
from moee_analysis.moe.layer import moe_layers, moe_names, replace_module
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, lively, toy_swin, toy_vit
from tests.helpers.runs import best, quick

IMAGES, FEW = toy_images(16), toy_images(8)
ONE_BLOCK = 0.015  # share of the small model's MACs in modes that come and go together
QUERIES = {"blocks.0.attn": None, "blocks.1.attn": 1}
KINDS = ("scores", "values")
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A toy, and the modes of its attentions."""
    model, root = toy_vit(depth=2), tmp_path_factory.mktemp("store")
    return model, attention_modes(model, IMAGES, QUERIES, seed=0, root=root)


def divergence(model, reduction):
    """Mean KL divergence of the predictions with a reduction of the first attention, in nats."""
    before = copy.deepcopy(model).double()
    after, site = copy.deepcopy(before), find_attentions(model)[0]
    replace_module(after, site.name, low_rank(site, site.module(after), reduction))
    x = torch.cat(list(IMAGES.batches(model))).double()
    p, q = (m(x).log_softmax(dim=-1) for m in (before, after))
    return float((p.exp() * (p - q)).sum(dim=-1).mean())


@kinds
def test_all_modes_are_the_dense_attention(measured, kind):
    for each in measured[1].values():
        modes, identity = getattr(each, kind), torch.eye(16).double().expand(2, -1, -1)
        whole = (modes.left * modes.strength[:, None]) @ modes.right.mT
        assert torch.allclose(whole, identity, atol=1e-6)
        factors = modes.factors(np.ones((2, 16), dtype=bool))
        assert torch.equal(factors.left @ factors.right.mT, identity)


def test_costs_are_those_of_finite_differences_of_the_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(attentions, "PROBES", 250)
    model = toy_vit(depth=2)
    site = find_attentions(model)[0]
    each = attention_modes(model, IMAGES, QUERIES, seed=0, root=tmp_path)[site.name]
    drawn = torch.randn(16, generator=torch.Generator().manual_seed(1)).double()
    for kind, change in product(KINDS, (torch.eye(16)[0].double(), drawn)):
        modes, c = getattr(each, kind), torch.ones(2, 16).double()
        c[0] += 1e-3 * change
        predicted = float(1e-6 * change @ modes.gram[0] @ change)
        moved = Factors(modes.left * (modes.strength * c)[:, None], modes.right)
        maps = dict.fromkeys(KINDS, Factors.whole(site)) | {kind: moved}
        seen = divergence(model, Reduction(**maps, mean=each.mean))
        assert predicted == pytest.approx(seen, rel=0.15)


def test_gains_are_the_best_there_are():
    drawn = torch.Generator().manual_seed(0)
    t = torch.randn(50, 6, generator=drawn, dtype=torch.float64)
    kept = torch.tensor([True, False, True, True, False, True])
    best = torch.linalg.lstsq(t[:, kept], t.sum(dim=1, keepdim=True)).solution[:, 0]
    assert torch.allclose(gains(t.T @ t / 100, kept), best, rtol=0.02)


def test_the_last_mode_is_the_one_that_can_replace_the_others():
    t = torch.randn(500, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = t * torch.tensor([0.1, 3.0, 0.2, 1.0, 0.3])
    gram, lost = t.T @ t / 1000, {}
    for pair in map(list, combinations(range(5), 2)):
        kept, rest = torch.zeros(5, dtype=torch.bool), torch.ones(5).double()
        kept[pair] = True
        rest[pair] -= gains(gram, kept)
        lost[tuple(pair)] = float(rest @ gram @ rest)
    costs = Modes(*[torch.eye(5).double()[None]] * 2, torch.ones(1, 5), gram[None]).costs[0]
    assert set(np.argsort(costs)[-2:]) == set(min(lost, key=lost.get))


@kinds
def test_modes_that_cost_little_move_the_prediction_little(measured, kind):
    model, found = measured
    each, seen = found["blocks.0.attn"], []
    rank = getattr(each, kind).costs.argsort(axis=1).argsort(axis=1)
    for kept in (rank >= 8, rank < 8):
        masks = dict.fromkeys(KINDS, np.ones((2, 16), dtype=bool)) | {kind: kept}
        maps = {name: getattr(each, name).factors(mask) for name, mask in masks.items()}
        seen.append(divergence(model, Reduction(**maps, mean=each.mean)))
    assert seen[0] < seen[1] / 3


def test_the_model_is_left_as_it_was_and_the_store_is_used(tmp_path):
    model = toy_vit(depth=1)
    before, queries = hooks_of(model), {"blocks.0.attn": 1}
    first = attention_modes(model, IMAGES, queries, seed=0, root=tmp_path)
    assert hooks_of(model) == before
    assert type(model.blocks[0].attn) is Attention
    assert not any(p.requires_grad for p in model.parameters())
    again = attention_modes(model, IMAGES, queries, seed=0, root=tmp_path)
    assert torch.equal(again["blocks.0.attn"].scores.gram, first["blocks.0.attn"].scores.gram)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def extracted(model, tmp_path_factory):
    """Take the model apart by settings, 0.3 of its MACs saved; its dense attentions' store."""
    store = tmp_path_factory.mktemp("store")
    return lambda config=best, **settings: extract(
        model, FEW, config(macs_reduction=0.3, **settings), store=store
    )


def planned(model):
    dense = count(model, sites=[site.name for site in plain_attentions(model)])
    config = best(attention="read").resolved()
    return plan_attentions(model, FEW, config, dense=dense, root=None)


def savings(run, model):
    names, layers = moe_names(run.model), moe_layers(run.model)
    cost = moe_macs(run.model, {names[i]: layers[i].macs_per_token() for i in names})
    return 1 - cost / count(model).total, 1 - count_parameters(run.model) / count_parameters(model)


# In the budget: what can be saved without any loss


def test_attention_of_what_is_read_changes_no_prediction():
    model = toy_vit()
    plans = planned(model)
    assert [(p.site.name, p.queries, p.modes) for p in plans] == [("blocks.2.attn", 1, None)]
    assert planned(toy_swin()) == []
    run = extract(model, FEW, best(attention="read", macs_reduction=0.1))
    assert list(reduced_attentions(run.model)) == ["blocks.2.attn"]
    tokens = model.blocks[2].norm1(model.forward_features(torch.randn(2, 3, 32, 32)))
    found, expected = (each.blocks[2].attn(tokens)[:, 0] for each in (run.model, model))
    assert torch.allclose(found, expected, atol=1e-5)


# One budget


@pytest.mark.parametrize("attention", ["read", "low_rank"])
@pytest.mark.parametrize("bound", [{}, {"params_reduction": 0.2}], ids=["MACs", "both"])
def test_the_budget_is_met_with_attention_in_it(model, extracted, attention, bound):
    macs, parameters = savings(extracted(attention=attention, **bound), model)
    assert macs == pytest.approx(0.3, abs=0.003) or (bound and macs > 0.3)
    if bound:
        assert 0.2 <= parameters < 0.2 + ONE_BLOCK or (parameters > 0.2 and macs < 0.303)


def test_the_share_of_the_paper_holds_for_heads_too(model, extracted):
    run = extracted(quick, recipe="paper", attention="low_rank")
    assert savings(run, model)[0] == pytest.approx(0.3, abs=0.003)
    assert len(reduced_attentions(run.model)) == 6


def test_attention_takes_what_neurons_need_not_save(model, extracted):
    dense, low = (extracted(attention=attention) for attention in ("dense", "low_rank"))
    assert not reduced_attentions(dense.model)
    active = [np.mean([each.active_fraction for each in run.layers]) for run in (dense, low)]
    assert active[1] > active[0]
    ranks = [each.ranks for each in reduced_attentions(low.model).values()]
    assert min(each.scores for each in ranks) < find_attentions(model)[0].head_dim
    assert all(rank % 8 == 0 for each in ranks for rank in (each.scores, each.values))


# What comes after


def test_a_saved_run_and_controls_keep_the_attention(model, extracted, tmp_path):
    run = extracted(attention="low_rank")
    run.save(tmp_path / "run")
    again, x = load(tmp_path / "run"), torch.randn(2, 3, 160, 160)
    assert torch.equal(again.model(x), run.model(x))
    assert len(reduced_attentions(randomly_routed(run))) == 6
    static = statically_pruned(run, FEW, store=tmp_path / "store")
    assert again.config.attention == static.config.attention == "low_rank"
    assert 0.3 <= savings(static, model)[0] < 0.3 + ONE_BLOCK


def test_a_model_without_plain_attention_is_refused_before_the_work(monkeypatch):
    planning = "moee_analysis.extraction.pipeline.group_tokens"
    monkeypatch.setattr(planning, lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(MoeeError, match="plain self-attention"):
        extract(toy_swin(), FEW, best(attention="low_rank", macs_reduction=0.1))
