import numpy as np
import pytest
import torch

from moee_analysis.baselines.controls import randomly_routed, statically_pruned
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention_plan import plan_attentions
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.attention import find_attentions, plain_attentions, reduced_attentions
from moee_analysis.models.macs import count, count_parameters, moe_macs
from moee_analysis.moe.layer import moe_layers, moe_names
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_swin, toy_vit
from tests.helpers.runs import best, quick

IMAGES = toy_images(8)
ONE_BLOCK = 0.015  # share of the small model's MACs in modes that come and go together


@pytest.fixture(scope="module")
def model():
    return lively()


@pytest.fixture(scope="module")
def extracted(model, tmp_path_factory):
    """Take the model apart by settings, 0.3 of its MACs saved; its dense attentions' store."""
    store = tmp_path_factory.mktemp("store")
    return lambda config=best, **settings: extract(
        model, IMAGES, config(macs_reduction=0.3, **settings), store=store
    )


def planned(model):
    dense = count(model, sites=[site.name for site in plain_attentions(model)])
    config = best(attention="read").resolved()
    return plan_attentions(model, IMAGES, config, dense=dense, root=None)


def savings(run, model):
    names, layers = moe_names(run.model), moe_layers(run.model)
    cost = moe_macs(run.model, {names[i]: layers[i].macs_per_token() for i in names})
    return 1 - cost / count(model).total, 1 - count_parameters(run.model) / count_parameters(model)


# What can be saved without any loss


def test_attention_of_what_is_read_changes_no_prediction():
    model = toy_vit()
    plans = planned(model)
    assert [(p.site.name, p.queries, p.modes) for p in plans] == [("blocks.2.attn", 1, None)]
    assert planned(toy_swin()) == []
    run = extract(model, IMAGES, best(attention="read", macs_reduction=0.1))
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
    static = statically_pruned(run, IMAGES, store=tmp_path / "store")
    assert again.config.attention == static.config.attention == "low_rank"
    assert 0.3 <= savings(static, model)[0] < 0.3 + ONE_BLOCK


def test_a_model_without_plain_attention_is_refused_before_the_work(monkeypatch):
    planning = "moee_analysis.extraction.pipeline.group_tokens"
    monkeypatch.setattr(planning, lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(MoeeError, match="plain self-attention"):
        extract(toy_swin(), IMAGES, best(attention="low_rank", macs_reduction=0.1))
