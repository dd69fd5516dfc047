import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import class_names, fingerprint, load_model, model_transform
from moee_analysis.utils.environment import own_folder
from tests.helpers.images import picture
from tests.helpers.models import SMALL_VIT, lively


def stored(path, content):
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth", "w.pt"])
def test_both_kinds_of_file_load(tmp_path, name):
    model = lively()
    path = stored(tmp_path / name, model.state_dict())
    assert fingerprint(load_model(SMALL_VIT, weights=path)) == fingerprint(model)


@pytest.mark.parametrize("name", [SMALL_VIT, "deit_tiny_distilled_patch16_224"])
def test_the_head_follows_the_weights(tmp_path, name):
    path = stored(tmp_path / "w.safetensors", lively(name, num_classes=7).state_dict())
    model = load_model(name, weights=path)
    assert model.num_classes == 7
    assert model.head.out_features == 7


def test_what_the_file_says_about_its_inputs_wins(tmp_path):
    names = [f"class {i}" for i in range(7)]
    cfg = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "label_names": names}
    save_file(
        lively(num_classes=7).state_dict(), tmp_path / "w.safetensors",
        metadata={"pretrained_cfg": json.dumps(cfg)},
    )  # fmt: skip
    model = load_model(SMALL_VIT, weights=tmp_path / "w.safetensors")
    assert class_names(model) == tuple(names)
    black = model_transform(model)(picture(0).point(lambda _: 0))
    torch.testing.assert_close(black.amax(dim=(1, 2)), torch.tensor([-0.1, -0.2, -0.3]))


@pytest.mark.parametrize("text", ["{'mean': ", "[1, 2]"])
def test_metadata_that_is_no_configuration_is_refused(tmp_path, text):
    path = tmp_path / "w.safetensors"
    save_file(lively().state_dict(), path, metadata={"pretrained_cfg": text})
    with pytest.raises(MoeeError, match="pretrained_cfg"):
        load_model(SMALL_VIT, weights=path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_file_that_may_not_be_read_is_told(tmp_path, name):
    stored(tmp_path / name, lively().state_dict()).chmod(0)
    with pytest.raises(MoeeError, match="Permission denied"):
        load_model(SMALL_VIT, weights=tmp_path / name)


def test_weights_of_another_architecture_or_shape_are_refused_by_name(tmp_path):
    path = stored(tmp_path / "w.pth", lively("test_convnext").state_dict())
    with pytest.raises(MoeeError, match=r"missing: cls_token, pos_embed.*more.*architecture"):
        load_model(SMALL_VIT, weights=path)
    tensors = lively().state_dict() | {"blocks.1.mlp.fc1.weight": torch.zeros(3, 3)}
    with pytest.raises(MoeeError, match=r"blocks\.1\.mlp\.fc1\.weight is \(3, 3\), not"):
        load_model(SMALL_VIT, weights=stored(tmp_path / "w.safetensors", tensors))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_a_truncated_or_foreign_file_is_refused(tmp_path, name):
    path = stored(tmp_path / name, lively().state_dict())
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


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3, "name": "mine"}, torch.zeros(2)])
def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(MoeeError, match=r"save model\.state_dict\(\)"):
        load_model(SMALL_VIT, weights=stored(tmp_path / "w.pth", content))


def test_the_bundled_architecture_takes_other_weights_too(tmp_path):
    model = lively("bundled")
    loaded = load_model(weights=stored(tmp_path / "w.safetensors", model.state_dict()))
    assert fingerprint(loaded) == fingerprint(model)
    assert loaded.pretrained_cfg["file"] == str(tmp_path / "w.safetensors")
    assert (
        "file" not in load_model(weights=own_folder("data") / "bundled.safetensors").pretrained_cfg
    )
