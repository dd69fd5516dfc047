"""Networks saved and loaded: by their names, around the dense one, with every kind of layer."""

import copy
import json
import shutil
from dataclasses import replace
from functools import partial

import pytest
import timm
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import FACTS, TENSORS, describe_origin, load
from moee_analysis.extraction.saving.rebuild import find_arguments
from moee_analysis.models.loading import build_model, find_mlps, load_model
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, replace_module
from moee_analysis.moe.routers import ConstantRouter, CosineRouter, NearestRouter, TokenKindRouter
from tests.helpers.images import toy_images
from tests.helpers.models import (
    SMALL_CONVNEXT,
    SMALL_VIT,
    lively,
    pixels_of,
    toy_kinds,
    toy_moe,
    toy_vit,
)
from tests.helpers.runs import parts_of, quick, run_of, saved_and_loaded, write_parts


def run_around(dense):
    """A run of the dense model, with random experts."""
    run = run_of(toy_moe(copy.deepcopy(dense)))
    return replace(run, provenance=describe_origin(dense, toy_images(6), quick().resolved()))


def created(name=SMALL_VIT, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval().requires_grad_(requires_grad=False)


def changed(change):
    change(model := created())
    return model


def relu(model):
    for block in model.blocks:
        block.mlp.act = nn.ReLU()


REBUILT = {
    "act_layer": lambda: created(act_layer="relu"),
    "a class as act_layer": lambda: created(act_layer=nn.SiLU),
    "num_heads": lambda: created(num_heads=4),
    "global_pool": lambda: created(global_pool="avg"),
    "fc_norm": lambda: created(global_pool="avg", fc_norm=False),
    "size and channels": lambda: created(img_size=96, in_chans=1),
    "drop rates": lambda: created(drop_rate=0.2, drop_path_rate=0.1),
    "depth and width": lambda: created(depth=2, embed_dim=96, num_heads=3),
    "a size for ConvNeXt": lambda: build_model(SMALL_CONVNEXT, img_size=96, num_classes=3),
    "a head by hand": lambda: changed(lambda m: setattr(m, "head", nn.Linear(64, 10))),
    "no head by hand": lambda: changed(lambda m: setattr(m, "head", nn.Identity())),
    "activations by hand": lambda: changed(relu),
    "another input size": lambda: changed(lambda m: m.set_input_size(img_size=128)),
    "another pool": lambda: changed(lambda m: m.reset_classifier(5, "avg")).eval(),
}
DEEP_HEAD = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))
BY_HAND = {
    "a norm": lambda: created(norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=0.1)),
    "a deep head": lambda: changed(lambda m: setattr(m, "head", copy.deepcopy(DEEP_HEAD))),
    "one activation": lambda: changed(lambda m: setattr(m.blocks[3].mlp, "act", nn.SiLU())),
    "a hook": lambda: changed(lambda m: m.norm.register_forward_hook(lambda *args: 2 * args[2])),
    "another name": lambda: changed(lambda m: m.pretrained_cfg.update(architecture="test_vit2")),
    "a class of its own": toy_vit,
}


@pytest.mark.parametrize("case", REBUILT)
def test_a_saved_run_answers_as_before(tmp_path, case):
    run = run_around(REBUILT[case]())
    run.save(tmp_path / "run")
    x = pixels_of(run.model)
    loaded = load(tmp_path / "run")
    torch.testing.assert_close(loaded.model(x), run.model(x))
    loaded.save(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again").model(x), run.model(x))


@pytest.mark.parametrize("case", BY_HAND)
def test_what_no_argument_says_is_saved_too_and_loaded_with_the_model(tmp_path, case):
    model = BY_HAND[case]()
    run = run_around(model)
    run.save(tmp_path / "run")
    with pytest.raises(MoeeError, match="no name rebuilds") as error:
        load(tmp_path / "run")
    assert "moee.load(folder, dense=model)" in error.value.hint
    loaded, x = load(tmp_path / "run", dense=model), pixels_of(model)
    torch.testing.assert_close(loaded.model(x), run.model(x))
    assert loaded.dense() is model
    model.norm.bias.data += 1
    with pytest.raises(MoeeError, match="other weights"):
        load(tmp_path / "run", dense=model)


def test_arguments_are_kept_and_given_again(tmp_path):
    torch.save(created(act_layer="relu", img_size=96).state_dict(), tmp_path / "w.pth")
    given = {"act_layer": "relu", "img_size": 96, "global_pool": "avg", "fc_norm": False}
    model = load_model(SMALL_VIT, weights=tmp_path / "w.pth", **given)
    assert find_arguments(model) == given
    run_around(model).save(tmp_path / "run")
    told = json.loads((tmp_path / "run" / FACTS).read_text())
    assert told["model"]["arguments"] == told["provenance"]["arguments"] == given
    x = pixels_of(model)
    torch.testing.assert_close(load(tmp_path / "run").dense()(x), model(x))


@pytest.mark.parametrize("arguments", [
    {"nonsense": 3}, {"img_size": "big"}, {"num_heads": 7}, {"img_size": 0}, {"img_size": -16},
    {"in_chans": 0}, {"in_chans": -1}, {"act_layer": "none such"}, {"pretrained": True},
    {"checkpoint_path": "w.pth"},
])  # fmt: skip
def test_arguments_that_timm_does_not_take_are_refused(arguments):
    with pytest.raises(MoeeError, match=next(iter(arguments))):
        build_model(SMALL_VIT, **arguments)


# Routers and readouts


def routers(dim):
    """A router of every kind that can be saved, each for three experts."""
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(5))
    few, projection, kinds = (
        torch.randn(2, 2),
        torch.randn(2, dim),
        partial(TokenKindRouter, tokens=101),
    )
    return {
        "cosine": CosineRouter(centres),
        "constant": ConstantRouter(2),
        "nearest": NearestRouter(centres, torch.tensor([0.5, 0.0, -0.5])),
        "projected": NearestRouter(torch.randn(3, 2), torch.zeros(3), projection),
        "kinds of projected": kinds((0,), NearestRouter(few, torch.zeros(2), projection)),
        "kinds of cosine": kinds((0,), CosineRouter(centres[1:])),
        "kinds of constant": kinds((0, 1), ConstantRouter(0)),
        "kinds of kinds": kinds((0,), TokenKindRouter((0,), ConstantRouter(0), tokens=100)),
    }


READOUTS = {
    "dense": lambda *_: None,
    "shared": lambda dim, hidden: Readout(torch.randn(dim, hidden)),
    "shared and shift": lambda dim, hidden: Readout(torch.randn(dim, hidden), torch.randn(3, dim)),
    "shift": lambda dim, _: Readout(None, torch.randn(3, dim)),
}
SOME = ([0, 3, 9], [3, 4], [])


@pytest.mark.parametrize(
    ("router", "readout", "experts"),
    [
        *[(router, "shift", SOME) for router in routers(1)],
        *[("nearest", readout, SOME) for readout in READOUTS],
        *[("nearest", readout, ([], [], [])) for readout in READOUTS],
        ("nearest", "shared", ([0], [1, 2], [7])),
    ],
)
def test_every_layer_is_loaded_as_it_was_saved(router, readout, experts, tmp_path):
    model = lively()
    site = find_mlps(model)[2]
    torch.manual_seed(3)
    layer = MoeMlp(
        site.module(model), routers(site.dim)[router], experts, [0.2, 0.5, 0.3],
        READOUTS[readout](site.dim, site.hidden),
    )  # fmt: skip
    replace_module(model, site.name, layer)
    other = moe_layers(saved_and_loaded(run_of(model.eval()), tmp_path / "run").model)[2]
    assert other.router.n_experts == layer.router.n_experts
    assert other.macs_per_token() == layer.macs_per_token()


def test_routers_are_described_in_the_json(tmp_path):
    run_of(toy_kinds(lively()).eval()).save(tmp_path / "run")
    told = json.loads((tmp_path / "run" / FACTS).read_text())["model"]["routers"]
    nested = {"kind": "token_kinds", "prefix": [0], "tokens": 101, "inner": {"kind": "nearest"}}
    assert told == {f"blocks.{index}.mlp": nested for index in range(6)}


# Files of another version


def with_facts(folder, change):
    facts, tensors = parts_of(folder)
    change(facts)
    return write_parts(folder, facts, tensors)


def as_format_6(facts):
    del facts["model"]["merging"], facts["config"]["merging"], facts["config"]["merges"]
    facts["format"] = 6


def as_format_5(facts):
    as_format_6(facts)
    model = facts["model"]
    for name in ("answers", "dtype", "by_hand"):
        del model[name]
    model["num_classes"] = model.pop("arguments").get("num_classes", 1000)
    facts["format"] = 5
    for name in ("arguments", "answers", "transform_sha256", "contents"):
        facts["provenance"].pop(name)


def test_a_run_of_format_6_loads(tmp_path):
    run = run_around(lively())
    run.save(tmp_path / "run")
    loaded, x = load(with_facts(tmp_path / "run", as_format_6)), pixels_of(run.model)
    torch.testing.assert_close(loaded.model(x), run.model(x))
    assert loaded.config.merging is None


def test_a_run_of_format_5_loads_if_its_facts_suffice(tmp_path):
    torch.save(lively(num_classes=7).state_dict(), tmp_path / "w.pth")
    dense = load_model(SMALL_VIT, weights=tmp_path / "w.pth")
    run = run_around(dense)
    run.save(tmp_path / "run")
    loaded, x = load(with_facts(tmp_path / "run", as_format_5)), pixels_of(dense)
    torch.testing.assert_close(loaded.model(x), run.model(x))
    torch.testing.assert_close(loaded.dense()(x), dense(x))
    run_around(lively(img_size=96)).save(tmp_path / "other")
    with pytest.raises(MoeeError, match=r"pos_embed is \(1, 37, 64\), not \(1, 101, 64\)"):
        load(with_facts(tmp_path / "other", as_format_5))


def test_fields_of_earlier_versions_are_left_out(tmp_path):
    run = run_around(lively())
    run.save(tmp_path / "run")

    def as_before(facts):
        facts["config"] |= {"union": "steps", "thin": "dense", "dense_tokens": []}
        if facts["config"]["clustering"]:
            facts["config"]["clustering"] |= {"selection": "eom", "metric": "cosine"}
        for layer in facts["layers"]:
            layer |= {"thin": False, "dense_tokens": []}

    loaded = load(with_facts(tmp_path / "run", as_before))
    assert (loaded.config, loaded.layers) == (run.config, run.layers)
    for removed in ({"refit": "each"}, {"dense_tokens": ["cls"]}):
        with pytest.raises(MoeeError, match="the version of this package that saved it"):
            load(with_facts(tmp_path / "run", lambda facts, r=removed: facts["config"].update(r)))


def test_a_network_or_tensors_that_answer_otherwise_are_refused(tmp_path):
    run_around(created(act_layer="relu")).save(tmp_path / "run")
    with pytest.raises(MoeeError, match="gives other outputs for the same images") as error:
        load(with_facts(tmp_path / "run", lambda f: f["model"]["arguments"].pop("act_layer")))
    assert "versions" in error.value.hint
    for seed in range(2):
        run_around(lively(seed=seed)).save(tmp_path / str(seed))
    shutil.copy(tmp_path / "1" / TENSORS, tmp_path / "0")
    with pytest.raises(MoeeError, match="gives other outputs"):
        load(with_facts(tmp_path / "0", lambda _: None))
