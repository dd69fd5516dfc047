from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.extraction.saving.rebuild import arguments_of
from moee_analysis.extraction.saving.run_files import FACTS, TENSORS, _checksum, _file_hash
from moee_analysis.models.loading import build_model, load_model
from tests.helpers.makers import SMALL_CONVNEXT, SMALL_VIT, lively, pixels_of, quick
from tests.helpers.toys import toy_images


def created(name=SMALL_VIT, **arguments):
    torch.manual_seed(0)
    return timm.create_model(name, **arguments).eval()


def headed(model, head):
    model.head = head
    return model


def relu(model):
    for block in model.blocks:
        block.mlp.act = nn.ReLU()
    return model


def resized(model):
    model.set_input_size(img_size=128)
    return model


def pooled(model):
    model.reset_classifier(5, "avg")
    return model.eval()


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
    "a head by hand": lambda: headed(created(), nn.Linear(64, 10)),
    "no head by hand": lambda: headed(created(), nn.Identity()),
    "activations by hand": lambda: relu(created()),
    "another input size": lambda: resized(created()),
    "another pool": lambda: pooled(created()),
}
BY_HAND = {
    "a norm": lambda: created(norm_layer=lambda dim, **_: nn.LayerNorm(dim, eps=0.1)),
    "a deep head": lambda: headed(created(), nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 3))),
    "one activation": lambda: one_changed(created()),
    "a hook": lambda: hooked(created()),
}


def one_changed(model):
    model.blocks[3].mlp.act = nn.SiLU()
    return model


def hooked(model):
    model.norm.register_forward_hook(lambda _module, _args, out: 2 * out)
    return model


@pytest.mark.parametrize("case", REBUILT)
def test_a_saved_run_answers_as_before(tmp_path, case):
    model = REBUILT[case]()
    run = extract(model, toy_images(24), quick(variance_kept=0.9))
    run.save(tmp_path / "run")
    x = pixels_of(model)
    loaded = load(tmp_path / "run")
    torch.testing.assert_close(loaded.model(x), run.model(x))
    loaded.save(tmp_path / "again")
    torch.testing.assert_close(load(tmp_path / "again").model(x), run.model(x))


@pytest.mark.parametrize("case", BY_HAND)
def test_what_no_argument_says_is_saved_too_and_loaded_with_the_model(tmp_path, case):
    model = BY_HAND[case]()
    run = extract(model, toy_images(24), quick(variance_kept=0.9))
    run.save(tmp_path / "run")
    with pytest.raises(MoeeError, match="no name rebuilds"):
        load(tmp_path / "run")
    x = pixels_of(model)
    torch.testing.assert_close(load(tmp_path / "run", dense=model).model(x), run.model(x))


def test_arguments_are_kept_and_given_again(tmp_path):
    torch.save(created(act_layer="relu", img_size=96).state_dict(), tmp_path / "w.pth")
    given = {"act_layer": "relu", "img_size": 96, "global_pool": "avg", "fc_norm": False}
    model = load_model(SMALL_VIT, weights=tmp_path / "w.pth", **given)
    assert arguments_of(model) == given
    run = extract(model, toy_images(24), quick())
    run.save(tmp_path / "run")
    told = json.loads((tmp_path / "run" / FACTS).read_text())
    assert told["model"]["arguments"] == told["provenance"]["arguments"] == given
    x = pixels_of(model)
    torch.testing.assert_close(load(tmp_path / "run").dense()(x), model(x))


@pytest.mark.parametrize("arguments",
    [
        {"nonsense": 3}, {"img_size": "big"}, {"num_heads": 7}, {"img_size": 0}, {"img_size": -16},
        {"in_chans": 0}, {"in_chans": -1}, {"act_layer": "none such"}, {"pretrained": True},
        {"checkpoint_path": "w.pth"},
    ],
)  # fmt: skip
def test_arguments_that_timm_does_not_take_are_refused(arguments):
    with pytest.raises(MoeeError, match=next(iter(arguments))):
        build_model(SMALL_VIT, **arguments)


# Files of another version


def with_facts(folder, change):
    facts = json.loads((folder / FACTS).read_text())
    del facts["checksum"]
    change(facts)
    (folder / FACTS).write_text(json.dumps(facts | {"checksum": _checksum(facts)}))
    return folder


def as_format_5(facts):
    model = facts["model"]
    for name in ("answers", "dtype", "by_hand"):
        del model[name]
    model["num_classes"] = model.pop("arguments").get("num_classes", 1000)
    facts["format"] = 5
    for name in ("arguments", "answers", "transform_sha256", "contents"):
        facts["provenance"].pop(name)


def test_a_run_of_before_loads_if_its_facts_suffice(tmp_path):
    model = lively(num_classes=7)
    torch.save(model.state_dict(), tmp_path / "w.pth")
    dense = load_model(SMALL_VIT, weights=tmp_path / "w.pth")
    run = extract(dense, toy_images(24), quick())
    run.save(tmp_path / "run")
    loaded = load(with_facts(tmp_path / "run", as_format_5))
    x = pixels_of(model)
    torch.testing.assert_close(loaded.model(x), run.model(x))
    torch.testing.assert_close(loaded.dense()(x), model(x))


def test_a_run_of_before_whose_facts_do_not_suffice_says_so_in_a_line(tmp_path):
    extract(lively(img_size=96), toy_images(24), quick()).save(tmp_path / "run")
    with pytest.raises(MoeeError, match=r"pos_embed is \(1, 37, 64\), not \(1, 101, 64\)"):
        load(with_facts(tmp_path / "run", as_format_5))


def test_a_network_that_answers_otherwise_is_refused(tmp_path):
    extract(created(act_layer="relu"), toy_images(24), quick()).save(tmp_path / "run")

    def forget(facts):
        del facts["model"]["arguments"]["act_layer"]

    with pytest.raises(MoeeError, match="gives other outputs for the same images") as error:
        load(with_facts(tmp_path / "run", forget))
    assert "versions" in error.value.hint


def test_tensors_of_another_run_of_the_same_shape_are_refused_by_their_answers(tmp_path):
    for number in range(2):
        run = extract(lively(seed=number), toy_images(24), quick(experts="one", macs_reduction=0.1))
        run.save(tmp_path / str(number))
    tensors = tmp_path / "0" / TENSORS
    tensors.write_bytes((tmp_path / "1" / TENSORS).read_bytes())

    def forge(facts):
        facts["tensors_sha256"] = _file_hash(tensors)

    with pytest.raises(MoeeError):
        load(with_facts(tmp_path / "0", forge))
