"""Runs whose budget is one of time: prices by hand, and measured ones without looking at them."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.cli.printing import layers_text
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import merging, pipeline, prices
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.merging import MergedMacs
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.prices import LOW_RANK, Price, Prices
from moee_analysis.extraction.saving.checks import check_facts
from moee_analysis.models.macs import count
from moee_analysis.models.merging import merging_blocks
from moee_analysis.moe.layer import MoeMlp, all_mlps, moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import pixels_of, toy_vit
from tests.helpers.runs import best, cost, parts_of, quick, saved_and_loaded, write_parts

IMAGES, MERGES = toy_images(24), (3, 4, 0)
MACS = 1e-9  # seconds of one MAC


def in_macs(tokens, ways, attentions, config, *, saved, factor=None):
    """Prices that are MACs, in a model whose tokens merge or not; times a ``factor`` by way."""
    factor, model = factor or {}, tokens.model
    names = {e.site.name for way in ways for e in way.layers if e.converted}
    names |= {plan.site.name for plan in attentions}
    counted = count(model, sites=names)
    own = {name: MACS * counted.by_module[name] for name in names}
    found = {way.name: {} for way in ways}
    for way in ways:
        for layer in (layer for layer in way.layers if layer.converted):
            name, more = layer.site.name, factor.get(way.name, 1)
            each = more * MACS * layer.tokens * 2 * layer.site.dim
            router = MACS * layer.tokens * layer.router().macs
            found[way.name][name] = Price(router + (more - 1) * own[name], each)
    dimensions = {p.site.name: 2 * p.site.heads * p.site.head_dim for p in attentions}
    found[LOW_RANK] = {
        p.site.name: Price(0.0, MACS * p.macs(None) / dimensions[p.site.name]) for p in attentions
    }
    whole = MACS * counted.total / (1 - saved)
    rest = MACS * counted.total - sum(own.values())
    return Prices(whole, rest, own, found)


def extracted(monkeypatch, settings, **factor):
    def share_of_time(model, tokens, _):
        return 1 - count(tokens.model).total / count(model).total

    monkeypatch.setattr(pipeline, "measure_prices", partial(in_macs, factor=factor))
    monkeypatch.setattr(pipeline, "share_of_time", share_of_time)
    return extract(toy_vit(), IMAGES, settings)


def saved(run):
    return 1 - cost(run) / count(run.dense()).total


@pytest.mark.parametrize("pieces", [
    {}, {"attention": "low_rank"}, {"attention": "read"}, {"coherence": "ignored"},
    {"attention": "low_rank", "merging": "budget", "merges": MERGES},
    {"layers": (0, 2), "macs_reduction": 0.15}, {"recipe": "paper", "budget": "global"},
])  # fmt: skip
def test_the_budget_is_met_and_used(monkeypatch, pieces):
    settings = best(**{"macs_reduction": 0.3, "budget_in": "time"} | pieces)
    run = extracted(monkeypatch, settings)
    assert -1e-9 < saved(run) - settings.macs_reduction < 0.03
    assert all(layer.reason for layer in run.layers)


@pytest.mark.parametrize("share", [0.15, 0.3])
def test_at_prices_of_macs_where_nothing_else_pays_the_run_is_that_of_a_budget_of_macs(
    monkeypatch, share
):
    run = extracted(monkeypatch, best(macs_reduction=share, budget_in="time"), pruned=1e6)
    wanted = extract(toy_vit(), IMAGES, best(macs_reduction=share))
    assert [e.sizes for e in run.layers] == [e.sizes for e in wanted.layers]
    assert torch.equal(run.model(x := pixels_of(run.model)), wanted.model(x))


def test_where_routing_is_dear_layers_are_pruned_alike_or_dense(monkeypatch):
    run = extracted(monkeypatch, best(macs_reduction=0.2, budget_in="time"), routed=1e3)
    mlps = list(all_mlps(run.model).values())
    assert all(mlp.uniform for mlp in mlps[:2] if isinstance(mlp, MoeMlp))
    for layer in (run.layers[0], run.layers[2]):  # nothing reads the patches of the last one
        assert layer.reason.startswith("pruned")
        assert "routed" in layer.reason
    assert mlps[2].expert_sizes[1] == 0
    for layer in run.layers:
        assert layer.reason in layers_text(run)


def test_with_time_for_all_layers_stay_dense(monkeypatch):
    merged = {"budget_in": "time", "merging": "budget", "merges": MERGES}
    run = extracted(monkeypatch, best(macs_reduction=0.05, **merged), routed=2, pruned=2)
    assert not moe_layers(run.model)
    assert run.layers[0].reason.startswith("0.")
    with pytest.raises(MoeeError, match="budget of time"):
        extracted(monkeypatch, best(macs_reduction=0.99, budget_in="time"))


def test_a_run_is_saved_and_loaded_and_earlier_ones_are(monkeypatch, tmp_path):
    run = extracted(monkeypatch, best(macs_reduction=0.3, budget_in="time", for_batch=8))
    saved_and_loaded(run, tmp_path / "run", dense=toy_vit())
    facts, tensors = parts_of(tmp_path / "run")
    del facts["config"]["budget_in"], facts["config"]["for_batch"]
    facts["format"] = 6
    write_parts(tmp_path / "old", facts, tensors)
    check_facts(parts_of(tmp_path / "old")[0], tmp_path / "old")
    assert ExtractConfig.from_json(facts["config"]) == replace(
        run.config, budget_in="macs", for_batch=64
    )


@pytest.mark.parametrize("pieces", [
    {}, {"budget": "share", "recipe": "best"}, {"params_reduction": 0.1, "recipe": "best"},
])  # fmt: skip
def test_a_budget_of_time_is_one_for_all_layers_of_time_alone(pieces):
    with pytest.raises(MoeeError, match="budget_in="):
        ExtractConfig(budget_in="time", **pieces)
    for wrong in (0, 2.5, "64"):
        with pytest.raises(MoeeError, match="for_batch"):
            ExtractConfig(for_batch=wrong)


# Measured


def wide_vit():
    """A toy whose MLPs take most of its time."""
    torch.manual_seed(0)
    like = toy_vit()
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=2, mlp_ratio=32, num_classes=6
    )
    model.pretrained_cfg = like.pretrained_cfg
    return model.eval().requires_grad_(requires_grad=False)


def test_prices_are_measured_once_for_all_layers_that_may_change(monkeypatch, tmp_path):
    measured = []

    def measure(*given, saved):
        assert saved == 0
        measured.append(real(*given, saved=saved))
        return measured[-1]

    real = prices.measure_prices
    monkeypatch.setattr(pipeline, "measure_prices", measure)
    config = best(macs_reduction=0.1, budget_in="time", for_batch=30, attention="low_rank")
    run = extract(wide_vit(), IMAGES, config, store=tmp_path)
    again = extract(wide_vit(), IMAGES, replace(config, macs_reduction=0.08), store=tmp_path)
    first, second = measured
    assert first == second  # found in the store
    assert len(list(tmp_path.glob("prices-*"))) == 1
    names = {f"blocks.{n}.{part}" for n in range(2) for part in ("mlp", "attn")}
    assert set(first.dense) == names
    assert set(first.ways) == {LOW_RANK, "routed", "pruned"}
    assert set(first.ways["pruned"]) == {"blocks.0.mlp", "blocks.1.mlp"}
    lines = [price for own in first.ways.values() for price in own.values()]
    assert min(min(price.fixed, price.each) for price in lines) >= 0
    assert min(first.whole, *first.dense.values()) > 0
    for found in (run, again):
        assert torch.isfinite(found.model(pixels_of(found.model))).all()


@pytest.mark.parametrize("share", [1.1, 0.8, 0.5, -0.2])
def test_tokens_merge_as_far_as_that_pays(monkeypatch, tmp_path, share):
    model = toy_vit(depth=6)
    macs = MergedMacs.of(model, unread="constant")

    def saved_time(dense, merged, *_, root):
        assert dense is model
        return share * macs.saved(merging_blocks(merged).schedule)

    monkeypatch.setattr(merging, "measure_saved_time", saved_time)
    config = best(macs_reduction=0.4, budget_in="time", merging="budget").resolved()
    merged = merging.merge_first(model, IMAGES, config, root=tmp_path)
    tokens = SimpleNamespace(model=merged, images=IMAGES, root=tmp_path)
    saved = merging.share_of_time(model, tokens, config)
    if share < merging.WORTH:
        assert merging_blocks(merged) is None
        assert saved == 0
    else:
        wanted = merging.saved_by_merging(config, macs)
        assert wanted <= saved < wanted + 0.07


def test_time_that_merging_saves_is_measured_once(tmp_path):
    model, config = toy_vit(), best(budget_in="time", for_batch=8)
    merged = merging.merge_alike(model, (1, 2, 0))
    found = [
        prices.measure_saved_time(model, merged, IMAGES, config, root=tmp_path) for _ in range(2)
    ]
    assert found[0] == found[1] < 1
    assert len(list(tmp_path.glob("prices-*"))) == 1


def test_a_price_is_the_line_through_what_was_measured():
    price = Price.through((10.0, 3.0), (30.0, 7.0))
    assert (price.fixed, price.each) == (1.0, 0.2)
    assert Price.through((10.0, 3.0), (30.0, 2.0)) == Price(3.0, 0.0)  # the machine was busy
    assert Price.through((10.0, 1.0), (30.0, 7.0)) == Price(0.0, 0.3)
    assert Price.through((10.0, 3.0)) == Price(3.0, 0.0)


def test_a_run_as_published_has_no_budget_of_time():
    with pytest.raises(MoeeError, match="a share of each layer"):
        quick(budget_in="time")
