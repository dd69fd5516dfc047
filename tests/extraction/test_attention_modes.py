import copy
from itertools import combinations, product

import numpy as np
import pytest
import torch
from timm.layers import Attention

from moee_analysis.extraction.attention_modes import Modes, attention_modes, gains
from moee_analysis.models.attention import Factors, Reduction, find_attentions, low_rank
from moee_analysis.moe.layer import replace_module
from tests.helpers.images import toy_images
from tests.helpers.models import hooks_of, toy_vit

IMAGES = toy_images(16)
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
    monkeypatch.setattr("moee_analysis.extraction.attention_modes.PROBES", 250)
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
