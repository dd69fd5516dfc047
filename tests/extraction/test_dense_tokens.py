"""Tokens of a kind that is kept dense: their expert is the whole MLP."""

from __future__ import annotations

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch
from timm.models.cait import Cait
from timm.models.vision_transformer import VisionTransformer

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed, statically_pruned
from moee_analysis.cli import main
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.saving.layer_report import LayerReport, extract, load
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count, count_parameters, moe_macs
from moee_analysis.moe.layer import moe_layers, moe_names
from moee_analysis.moe.routers import ConstantRouter
from tests.helpers.makers import best, lively, pixels_of, quick, same_models
from tests.helpers.toys import toy_images, toy_swin, toy_vit

IMAGES = toy_images(12)


def ready(model):
    model.pretrained_cfg = toy_vit().pretrained_cfg
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(requires_grad=False)


def with_registers():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
    return ready(VisionTransformer(**sizes, mlp_ratio=2, num_classes=6, reg_tokens=2))


def cait():
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return ready(Cait(**sizes, num_classes=6, depth_token_only=1, init_values=1.0))


POSITIONS = {"cls": [0], "register": [1, 2], "patch": [*range(3, 19)]}  # with registers


def outputs_at(run, kinds):
    """Outputs of the routed layers at the tokens of such kinds, and those of the dense MLPs."""
    generator = torch.Generator().manual_seed(1)
    places = sorted(place for kind in kinds for place in POSITIONS[kind])
    dense = {site.index: site.module(run.dense()) for site in find_mlps(run.dense())}
    for index, layer in moe_layers(run.model).items():
        x = torch.randn(5, 19, 32, generator=generator)
        yield layer(x)[:, places], dense[index](x)[:, places]


@pytest.mark.parametrize("kinds", [("cls",), ("register", "cls"), ("patch",), ("cls", "patch")])
@pytest.mark.parametrize(
    "config",
    [
        quick(variance_kept=0.6),
        quick(macs_reduction=0.01, refit="shift"),
        best(macs_reduction=0.01),
        best(macs_reduction=0.01, refit="each", order="obs"),
    ],
    ids=["paper", "paper with shift", "best", "best with each"],
)
def test_outputs_of_tokens_kept_dense_are_those_of_the_dense_mlp(kinds, config):
    config = ExtractConfig(**{**vars(config), "dense_tokens": kinds, "thin": "routed"})
    run = extract(with_registers(), IMAGES, config)
    assert any(layer.converted for layer in run.layers)
    for routed, dense in outputs_at(run, kinds):
        torch.testing.assert_close(routed, dense, rtol=1e-5, atol=1e-5)
    others = set(POSITIONS) - set(kinds)
    assert any(not torch.allclose(*pair, atol=1e-3) for pair in outputs_at(run, others))
    for layer in run.layers:
        if layer.converted:
            assert layer.union_fraction == 1
            assert layer.dense_tokens == kinds


@pytest.mark.parametrize("settings", [quick, best])
@pytest.mark.parametrize("kinds", [("cls",), ("register",)])
def test_macs_are_those_of_every_token_s_own_neurons(settings, kinds):
    run = extract(with_registers(), IMAGES, settings(macs_reduction=0.15, dense_tokens=kinds))
    table = measure.macs(run, IMAGES).set_index("component")
    images = torch.cat(list(IMAGES.batches(run.model)))
    for name, layer in zip(moe_names(run.model).values(), moe_layers(run.model).values(), strict=1):
        seen = []
        hook = layer.router.register_forward_hook(lambda *a, s=seen: s.append(a[2][:, 0].tolist()))
        run.model(images)
        hook.remove()
        spent = 0
        for place, expert in enumerate(seen[0]):
            spent += 2 * 32 * layer.expert_sizes[expert]
            spent += layer.router.inner.macs if place % 19 >= 3 else 0
        assert table.loc[name, "macs"] == pytest.approx(spent / len(IMAGES))


@pytest.mark.parametrize("kinds", [("cls",), ("cls", "register")])
@pytest.mark.parametrize("settings", [quick, best])
def test_the_others_pay_for_the_budget(settings, kinds):
    run = extract(with_registers(), IMAGES, settings(macs_reduction=0.15, dense_tokens=kinds))
    total = measure.macs(run).iloc[-1]
    assert 0.15 - 1e-9 <= 1 - total["macs"] / total["macs_dense"] < 0.17


def test_patches_kept_dense_are_not_even_clustered():
    run = extract(toy_vit(), IMAGES, best(macs_reduction=0.005, dense_tokens=("patch",)))
    for layer in moe_layers(run.model).values():
        assert isinstance(layer.router.inner, ConstantRouter)
        assert layer.expert_sizes[1] == 64
        assert layer.expert_sizes[0] < 64
    saved = 1 - count_parameters(run.model) / count_parameters(run.dense())
    assert saved < 0  # a shift more, and no neuron less


def test_a_layer_whose_tokens_are_all_kept_dense_is_left_alone():
    run = extract(cait(), IMAGES, best(macs_reduction=0.2, dense_tokens=("cls",)))
    assert [layer.converted for layer in run.layers] == [True, True, False]
    assert run.layers[2].reason == "all of its tokens are kept dense"
    assert [layer.dense_tokens for layer in run.layers] == [(), (), ("cls",)]
    assert run.layers[0].union_fraction < 1  # no CLS token comes there


# What is refused


@pytest.mark.parametrize(
    ("build", "settings", "told"),
    [
        (toy_vit, {"dense_tokens": ("register",)}, r"layers see \(cls, patch\); found 'register'"),
        (toy_swin, {"dense_tokens": ("cls",)}, r"layers see \(patch\); found 'cls'"),
        (toy_vit, {"dense_tokens": ("cls", "patch")}, "left to experts.*keep fewer kinds"),
        (toy_swin, {"dense_tokens": ("patch",)}, "left to experts"),
        (
            toy_vit, {"dense_tokens": ("cls",), "params_reduction": 0.3},
            "a parameters reduction of 30.0%; found layers that store all of their neurons",
        ),
        (toy_vit, {"dense_tokens": ("patch",), "macs_reduction": 0.3}, "what stays dense"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(build, settings, told):
    with pytest.raises(MoeeError, match=told):
        extract(build(), IMAGES, best(**settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"dense_tokens": ("cls", "patches")}, "cls, dist, register, patch; found 'patches'"),
        ({"dense_tokens": "cls"}, "as a tuple.*found 'cls'"),
        ({"dense_tokens": ("cls",), "tokens": "alike"}, 'with tokens="kinds"'),
        ({"dense_tokens": ("cls",), "refit": "shared"}, "choose another refit"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told):
    with pytest.raises(MoeeError, match=told):
        ExtractConfig(recipe="best", **settings)


@pytest.mark.parametrize(("recipe", "refit"), [("paper", "none"), ("best", "shift")])
def test_the_recipe_gives_leading_tokens_experts_and_leaves_w2_as_it_is(recipe, refit):
    config = ExtractConfig(recipe=recipe, dense_tokens=("cls",)).resolved()
    assert (config.tokens, config.refit) == ("kinds", refit)
    assert config.resolved() == config
    assert ExtractConfig.from_json(json.loads(json.dumps(asdict(config)))) == config


# Saved, and beside its controls


def test_a_run_is_the_same_after_saving(tmp_path):
    run = extract(lively(), IMAGES, best(macs_reduction=0.15, dense_tokens=("cls",)))
    run.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    assert loaded.config == run.config
    assert loaded.layers == run.layers
    assert same_models(loaded.model, run.model)


def test_a_report_of_an_older_run_keeps_no_tokens_dense():
    report = LayerReport(0, "mlp", 8, converted=True, reason="", sizes=(3, 4))
    facts = asdict(report)
    del facts["dense_tokens"]
    assert LayerReport.from_json(facts) == report


def test_controls_keep_the_same_tokens_dense():
    run = extract(with_registers(), IMAGES, best(macs_reduction=0.15, dense_tokens=("register",)))
    x = pixels_of(run.model)
    pruned = statically_pruned(run, IMAGES)
    control = randomly_routed(run)
    assert not torch.equal(control(x), run.model(x))
    costs = []
    for model in (run.model, pruned.model, control):
        names = moe_names(model)
        layers = moe_layers(model)
        costs.append(moe_macs(model, {names[i]: layers[i].macs_per_token() for i in names}))
        for layer in layers.values():
            assert layer.router.prefix.tolist() == [0, 1, 1]
            assert layer.expert_sizes[1] == 64
    budget = 0.85 * count(run.dense()).total
    np.testing.assert_allclose(costs[:2], budget, rtol=0.02)


def test_the_command_line_takes_kinds(tmp_path, capsys):
    command = ["extract", "--preset", "smoke", "--out", str(tmp_path / "run")]
    assert main([*command, "--dense-tokens", "cls,register"]) == 2
    assert "'register'" in capsys.readouterr().err
    assert main([*command, "--dense-tokens", "cls", "--variance-kept", "0.7"]) == 0
    assert load(tmp_path / "run").config.dense_tokens == ("cls",)
