"""Every kind of router and readout, saved and loaded."""

from __future__ import annotations

import json

import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import load
from moee_analysis.extraction.saving.run_files import FACTS, write_run
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import MoeMlp, Readout, moe_layers, replace_module
from moee_analysis.moe.routers import (
    ConstantRouter,
    CosineRouter,
    NearestRouter,
    RandomRouter,
    TokenKindRouter,
)
from tests.helpers.makers import contents, lively, pixels_of, run_of, same_models
from tests.helpers.toys import toy_kinds


def routers(dim):
    """A router of every kind that can be saved, each for three experts."""
    centres = torch.randn(3, dim, generator=torch.Generator().manual_seed(5))
    return {
        "cosine": CosineRouter(centres),
        "constant": ConstantRouter(2),
        "nearest": NearestRouter(centres, torch.tensor([0.5, 0.0, -0.5])),
        "projected": NearestRouter(torch.randn(3, 2), torch.zeros(3), torch.randn(2, dim)),
        "kinds of projected": TokenKindRouter(
            (0,),
            NearestRouter(torch.randn(2, 2), torch.zeros(2), torch.randn(2, dim)),
            tokens=101,
        ),
        "kinds of cosine": TokenKindRouter((0,), CosineRouter(centres[1:]), tokens=101),
        "kinds of constant": TokenKindRouter((0, 1), ConstantRouter(0), tokens=101),
        "kinds of kinds": TokenKindRouter(
            (0,), TokenKindRouter((0,), ConstantRouter(0), tokens=100), tokens=101
        ),
    }


READOUTS = {
    "dense": lambda *_: None,
    "shared": lambda dim, hidden: Readout(torch.randn(dim, hidden)),
    "own": lambda dim, hidden: Readout(torch.randn(3, dim, hidden)),
    "own and shift": lambda dim, hidden: Readout(torch.randn(3, dim, hidden), torch.randn(3, dim)),
    "shift": lambda dim, _: Readout(None, torch.randn(3, dim)),
}


def same_after_saving(model, folder):
    run_of(model).save(folder)
    loaded = load(folder).model
    x = pixels_of(model)
    assert same_models(loaded, model)
    assert torch.equal(loaded(x), model(x))
    for index, layer in moe_layers(model).items():
        other = moe_layers(loaded)[index]
        assert other.router.n_experts == layer.router.n_experts
        assert other.macs_per_token() == layer.macs_per_token()
    run_of(loaded).save(folder.with_name("copy"))
    assert contents(folder.with_name("copy")) == contents(folder)


def with_layer(*, router="nearest", readout="own and shift", experts=([0, 3, 9], [3, 4], [])):
    model = lively()
    site = find_mlps(model)[2]
    torch.manual_seed(3)
    layer = MoeMlp(
        site.module(model), routers(site.dim)[router], experts, [0.2, 0.5, 0.3],
        READOUTS[readout](site.dim, site.hidden),
    )  # fmt: skip
    replace_module(model, site.name, layer)
    return model.eval()


@pytest.mark.parametrize("router", routers(1))
def test_every_router_is_loaded_as_it_was_saved(router, tmp_path):
    same_after_saving(with_layer(router=router), tmp_path / "run")


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("experts", [[[0, 3, 9], [3, 4], []], [[], [], []], [[0], [1, 2], [7]]])
def test_every_readout_is_loaded_as_it_was_saved(readout, experts, tmp_path):
    same_after_saving(with_layer(readout=readout, experts=experts), tmp_path / "run")


def test_layers_with_everything_are_saved_and_described(tmp_path):
    same_after_saving(toy_kinds(lively()).eval(), tmp_path / "run")
    told = json.loads((tmp_path / "run" / FACTS).read_text())["model"]["routers"]
    nested = {"kind": "token_kinds", "prefix": [0], "tokens": 101, "inner": {"kind": "nearest"}}
    assert told == {f"blocks.{index}.mlp": nested for index in range(6)}


def test_a_control_of_the_patches_alone_is_refused_too(tmp_path):
    model = toy_kinds(lively())
    moe_layers(model)[3].router.inner = RandomRouter(torch.ones(3), dim=64)
    with pytest.raises(MoeeError, match="RandomRouter"):
        write_run(tmp_path / "control", model, {})
    assert not list(tmp_path.iterdir())
