"""Weights from files: whatever others wrapped them in, fitted to a model or refused by name."""

import argparse
import json
import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from timm.models import adapt_input_conv
from timm.models.vision_transformer import resample_abs_pos_embed

from moee_analysis.errors import MoeeError
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import (
    build_model,
    class_names,
    fingerprint,
    load_model,
    model_transform,
)
from moee_analysis.utils.environment import own_folder
from tests.helpers.images import picture
from tests.helpers.models import SMALL_CONVNEXT, SMALL_VIT, lively

PREFIXES = (
    "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "module._orig_mod.",
    "model.backbone.", "student.network.",
)  # fmt: skip
FIRST = {SMALL_VIT: "patch_embed.proj", SMALL_CONVNEXT: "stem.0"}
WRAPPERS = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema")


@pytest.fixture(scope="module")
def model():
    return lively()


def written(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def prefixed(tensors, prefix):
    return {prefix + name: tensor for name, tensor in tensors.items()}


def check_loads(path, content, model):
    """The file holds the weights of the model."""
    loaded = load_model(SMALL_VIT, weights=written(path, content))
    assert hash_weights(loaded) == hash_weights(model)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_looked_through(tmp_path, model, prefix, capsys):
    name = "w.safetensors" if prefix == "model." else "w.pth"
    check_loads(tmp_path / name, prefixed(model.state_dict(), prefix), model)
    assert f"'{prefix}'" in capsys.readouterr().out


@pytest.mark.parametrize(("keys", "prefix"), [
    *[((key,), "") for key in WRAPPERS],
    *[(("state_dict", key), "module.") for key in WRAPPERS[::2]], (("model", "net"), ""),
])  # fmt: skip
def test_wrappers_are_looked_through_also_nested(tmp_path, model, keys, prefix):
    content = prefixed(model.state_dict(), prefix)
    for key in reversed(keys):
        content = {key: content, "epoch": 3, "best": torch.tensor(71.2)}
    check_loads(tmp_path / "w.pth", content, model)


def test_averaged_weights_are_preferred_aloud(tmp_path, model, capsys):
    averaged = lively(seed=1)
    for key in ("state_dict_ema", "model_ema"):
        content = {"state_dict": model.state_dict(), key: averaged.state_dict()}
        check_loads(tmp_path / "w.pth", content, averaged)
        assert f"'{key}'" in capsys.readouterr().out
    for prefix in ("model_ema.module.", "ema_model."):  # within one state dict
        both = prefixed(model.state_dict(), "model.") | prefixed(averaged.state_dict(), prefix)
        check_loads(tmp_path / "w.ckpt", {"state_dict": both}, averaged)
        assert f"'{prefix}'" in capsys.readouterr().out


def test_what_stands_beside_the_weights_is_no_obstacle(tmp_path, model):
    content = {
        "model": model.state_dict(), "args": argparse.Namespace(lr=0.1, name="x"),
        "best": np.float64(0.7), "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "ema": {"decay": 0.9, "shadow_params": list(model.state_dict().values())},
        "rng": torch.tensor(71.2), "step": torch.tensor(3), "rates": [0.1, 0.2],
    }  # fmt: skip
    check_loads(tmp_path / "w.pth", content, model)


@pytest.mark.parametrize("inside", ["_orig_mod.", "_fsdp_wrapped_module."])
def test_wrapped_parts_are_looked_through(tmp_path, model, inside):
    tensors = prefixed(model.state_dict(), "module.").items()
    wrapped = {n.replace("blocks.1.", f"blocks.1.{inside}"): t for n, t in tensors}
    check_loads(tmp_path / "w.pth", wrapped, model)


OFFICIAL = {
    "swin_tiny_patch4_window7_224": [("head.fc.", "head.")],
    "convnext_atto": [
        ("head.fc.", "head."), ("head.norm.", "norm."), (".mlp.fc1.", ".pwconv1."),
        (".mlp.fc2.", ".pwconv2."), (".conv_dw.", ".dwconv."), ("stem.", "downsample_layers.0."),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("name", "prefix"), [*zip(OFFICIAL, ("", "module."), strict=True)])
def test_names_of_the_architecture_s_own_repository_are_timm_s_to_translate(tmp_path, name, prefix):
    model = build_model(name, num_classes=10)
    tensors = dict(model.state_dict())
    for ours, theirs in OFFICIAL[name]:
        tensors = {key.replace(ours, theirs): tensor for key, tensor in tensors.items()}
    if "convnext" in name:
        moved = r"stages\.(\d)\.downsample", r"downsample_layers.\1"
        tensors = {re.sub(*moved, key).replace(".blocks.", "."): t for key, t in tensors.items()}
    else:
        moved = r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample"
        tensors = {re.sub(*moved, key): tensor for key, tensor in tensors.items()}
    path = written(tmp_path / "w.pth", {"model": prefixed(tensors, prefix)})
    loaded = load_model(name, weights=path)
    assert loaded.num_classes == 10
    assert hash_weights(loaded) == hash_weights(model)


def test_a_head_may_stand_outside_the_backbone(tmp_path, model, capsys):
    tensors = prefixed(model.state_dict(), "model.backbone.")
    for name in ("head.weight", "head.bias"):
        tensors[f"model.{name}"] = tensors.pop(f"model.backbone.{name}")
    tensors["criterion.weight"] = torch.ones(3)
    path = written(tmp_path / "w.ckpt", {"state_dict": tensors})
    assert hash_weights(load_model(SMALL_VIT, weights=path)) == hash_weights(model)
    assert "left 1 tensors outside it, such as criterion.weight" in capsys.readouterr().out


def test_one_network_among_others_is_chosen_by_the_usual_names(tmp_path, model):
    other = prefixed(lively(seed=1).state_dict(), "teacher.")
    check_loads(tmp_path / "w.pth", other | prefixed(model.state_dict(), "backbone."), model)
    both = prefixed(model.state_dict(), "student.") | other
    with pytest.raises(MoeeError, match=r"'student\.', 'teacher\.'"):
        load_model(SMALL_VIT, weights=written(tmp_path / "w.pth", both))


# Types, sizes and channels


@pytest.mark.parametrize(("dtype", "name"), [
    (torch.float16, "w.pth"), (torch.bfloat16, "w.safetensors"), (torch.float64, "w.pth"),
])  # fmt: skip
def test_tensors_of_every_precision_load(tmp_path, model, dtype, name):
    tensors = {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}
    loaded = load_model(SMALL_VIT, weights=written(tmp_path / name, tensors))
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, tensors[key].float())


def test_position_embeddings_of_another_size_are_resampled_as_timm_does(tmp_path, model, capsys):
    path = written(tmp_path / "w.pth", model.state_dict())
    loaded = load_model(SMALL_VIT, weights=path, img_size=96)
    grid = loaded.patch_embed.grid_size
    expected = resample_abs_pos_embed(model.pos_embed, new_size=grid, num_prefix_tokens=1)
    torch.testing.assert_close(loaded.pos_embed, expected)
    assert loaded(torch.zeros(1, 3, 96, 96)).shape == (1, 1000)
    assert "resampled for this model's images: pos_embed" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "channels"), [
    (SMALL_VIT, 1), (SMALL_VIT, 2), (SMALL_VIT, 4), (SMALL_CONVNEXT, 1), (SMALL_CONVNEXT, 6),
])  # fmt: skip
def test_patch_embeddings_of_other_channels_are_adapted_as_timm_does(tmp_path, name, channels):
    model, first = lively(name), FIRST[name]
    path = written(tmp_path / "w.pth", prefixed(model.state_dict(), "module."))
    loaded = load_model(name, weights=path, in_chans=channels)
    expected = adapt_input_conv(channels, model.get_parameter(f"{first}.weight"))
    torch.testing.assert_close(loaded.get_parameter(f"{first}.weight"), expected)


def test_weights_of_one_channel_see_grey_pictures_as_before(tmp_path):
    grey = lively(in_chans=1)
    path = written(tmp_path / "w.pth", grey.state_dict())
    rgb = load_model(SMALL_VIT, weights=path)
    x = torch.randn(2, 1, 160, 160)
    torch.testing.assert_close(rgb(x.expand(-1, 3, -1, -1)), grey(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [SMALL_VIT, "deit_tiny_distilled_patch16_224"])
def test_the_head_follows_the_weights_also_where_there_is_none(tmp_path, name, capsys):
    tensors = lively(name, num_classes=7).state_dict()
    model = load_model(name, weights=written(tmp_path / "w.safetensors", tensors))
    assert model.num_classes == model.head.out_features == 7
    tensors = {key: t for key, t in tensors.items() if not key.startswith("head")}
    features = load_model(name, weights=written(tmp_path / "w.pth", tensors))
    assert features.num_classes == 0
    x = torch.zeros(1, *model.pretrained_cfg["input_size"])
    assert features(x).shape == (1, model.num_features)
    assert "no classifier" in capsys.readouterr().out


def test_what_the_file_says_about_its_images_and_classes_wins(tmp_path):
    names, dense = [f"class {i}" for i in range(7)], lively(num_classes=7, img_size=96)
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "label_names": names}
    cfg |= {"input_size": [3, 96, 96]}
    path = tmp_path / "w.safetensors"
    save_file(dense.state_dict(), path, metadata={"pretrained_cfg": json.dumps(cfg)})
    model = load_model(SMALL_VIT, weights=path)
    assert hash_weights(model) == hash_weights(dense)
    assert class_names(model) == tuple(names)
    black = model_transform(model)(picture(0).point(lambda _: 0))
    torch.testing.assert_close(black.amax(dim=(1, 2)), torch.tensor([-0.1, -0.2, -0.3]))


def test_the_bundled_architecture_takes_other_weights_too(tmp_path):
    model = lively("bundled")
    for name in ("w.safetensors", "w.pth", "w.pt"):
        loaded = load_model(weights=written(tmp_path / name, model.state_dict()))
        assert fingerprint(loaded) == fingerprint(model)
        assert loaded.pretrained_cfg["file"] == str(tmp_path / name)
    stored = load_model(weights=own_folder("data") / "bundled.safetensors")
    assert "file" not in stored.pretrained_cfg


# What does not fit


@pytest.mark.parametrize("content", [
    [1, 2], {"epoch": 3, "name": "mine"}, torch.zeros(2), {"student": {"a": 1}},
])  # fmt: skip
def test_a_checkpoint_without_a_state_dict_is_refused_by_its_keys(tmp_path, content):
    with pytest.raises(MoeeError, match=r"save model\.state_dict\(\)") as error:
        load_model(SMALL_VIT, weights=written(tmp_path / "w.pth", content))
    keys = content if isinstance(content, dict) else ()
    assert all(key in error.value.found for key in keys)


@pytest.mark.parametrize("text", ["{'mean': ", "[1, 2]"])
def test_metadata_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file(lively().state_dict(), path, metadata={"pretrained_cfg": text})
    with pytest.raises(MoeeError, match="pretrained_cfg"):
        load_model(SMALL_VIT, weights=path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_may_not_be_read_is_told(tmp_path, name):
    written(tmp_path / name, lively().state_dict()).chmod(0)
    with pytest.raises(MoeeError, match="Permission denied"):
        load_model(SMALL_VIT, weights=tmp_path / name)


def test_tensors_that_are_missing_surplus_or_of_another_shape_are_named(tmp_path, model):
    other, tensors = lively("test_convnext").state_dict(), model.state_dict()
    shape = tensors | {"blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}
    moved = {k.replace("blocks.2.", "layers.blocks.2."): tensor for k, tensor in tensors.items()}
    missing = "missing: blocks.2.norm1.weight, blocks.2.norm1.bias, blocks.2.attn.qkv.weight and "
    for content, words in (
        (other, ("missing: cls_token, pos_embed", "more", "architecture")),
        (shape, ("blocks.1.mlp.fc1.weight is (3, 3), not",)),
        ({"state_dict": prefixed(moved, "module.")},
         (missing, "not in the model: layers.blocks.2.", "prefix 'module.'", "--model")),
    ):  # fmt: skip
        with pytest.raises(MoeeError) as error:
            load_model(SMALL_VIT, weights=written(tmp_path / "w.pth", content))
        assert all(part in str(error.value) for part in words)
    assert str(error.value).count("and ") >= 2


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, name):
    path = written(tmp_path / name, lively().state_dict())
    whole = path.read_bytes()
    foreign = [b"no weights at all\n", b"\x80\x04garbage", b"PK\x03\x04zip?"]
    for content in [*(whole[:kept] for kept in (0, 7, 100, 100_000, -1)), *foreign]:
        path.write_bytes(content)
        with pytest.raises(MoeeError, match=rf"{name}.*(again|state dict)"):
            load_model(SMALL_VIT, weights=path)


@pytest.mark.parametrize("name", ["missing.pth", "folder", "pipe.safetensors"])
def test_what_is_no_file_is_told(tmp_path, name):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(MoeeError, match=r"no such file|a folder|a named pipe"):
        load_model(SMALL_VIT, weights=tmp_path / name)


class Trap:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("wrapped", [False, True, None])
@pytest.mark.parametrize(
    "save", [torch.save, lambda what, path: path.write_bytes(pickle.dumps(what))]
)
def test_code_in_a_checkpoint_is_never_executed(tmp_path, wrapped, save):
    trap = Trap(tmp_path / "executed") if wrapped is not None else torch.nn.Linear(2, 2)
    save({"model": lively().state_dict(), "extra": trap} if wrapped else trap, tmp_path / "w.pth")
    with pytest.raises(MoeeError, match="save the state dict alone"):
        load_model(SMALL_VIT, weights=tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()
