import numpy as np
import pytest
import timm
import torch
from huggingface_hub import constants as hub
from PIL import Image

from moee_analysis.errors import MoeeError
from moee_analysis.models import loading as models
from moee_analysis.models.loading import (
    build_model,
    class_labels,
    class_names,
    find_mlps,
    load_model,
    model_transform,
)
from tests.helpers.models import SMALL_CONVNEXT, SMALL_VIT, toy_swin, toy_vit


def test_mlps_are_found_in_order_with_their_widths():
    sites = find_mlps(toy_vit())
    assert [(s.name, s.index, s.dim, s.hidden) for s in sites] == [
        (f"blocks.{i}.mlp", i, 32, 64) for i in range(3)
    ]
    assert [(s.dim, s.hidden) for s in find_mlps(toy_swin())] == [(16, 32), (32, 64)]
    convnext = find_mlps(build_model(SMALL_CONVNEXT))
    assert all(site.hidden == 4 * site.dim for site in convnext)
    assert [site.index for site in convnext] == list(range(len(convnext)))


@pytest.mark.parametrize(("name", "found"), [
    ("resnet18", "no MLP at all in ResNet"),
    ("eva02_tiny_patch14_224", "only 12 x GluMlp (gated: "),
    ("poolformer_s12", "only 12 x Mlp (Conv2d, Identity) (convolutional: "),
    ("convnextv2_atto", "only 12 x GlobalResponseNormMlp (GRN inside: "),
])  # fmt: skip
def test_a_model_without_plain_mlps_is_told_what_it_has_instead(name, found):
    with pytest.raises(MoeeError) as error:
        find_mlps(timm.create_model(name))
    assert found in error.value.found
    assert "choose a ViT" in error.value.hint


@pytest.mark.parametrize(("name", "hint"), [
    ("deit_tiny_patch16_225", "did you mean.*deit_tiny_patch16_224"),
    ("bundled_swim", "bundled_swin, bundled_convnext or the name of a timm.*mean bundled_swin"),
    ("???", "list_models"), ("my/file.pth", r"weights='my/file\.pth'"),
    ("deit_tiny_patch16_224.nonsense", r"deit_tiny_patch16_224\.fb_in1k"),
])  # fmt: skip
def test_an_odd_name_is_told_what_to_give(name, hint):
    with pytest.raises(MoeeError, match=hint):
        load_model(name)


def test_offline_without_weights_says_what_to_pass(monkeypatch, tmp_path):
    monkeypatch.setattr("moee_analysis.models.weights._hub_answers", lambda: False)
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    before = hub.HF_HUB_OFFLINE
    with pytest.raises(MoeeError) as error:
        load_model(SMALL_VIT)
    assert "offline" in error.value.found
    assert "weights='path/to/file.safetensors'" in error.value.hint
    assert "\n" not in str(error.value)
    assert before == hub.HF_HUB_OFFLINE


@pytest.mark.parametrize(("device", "words"), [
    ("toaster", "a device of this"), ("cuda:99", "a device of this"), ("meta", "meta"),
])  # fmt: skip
def test_a_device_that_is_not_there_or_holds_no_values_is_refused(device, words):
    with pytest.raises(MoeeError, match=words):
        load_model(device=device)


def test_pictures_are_cropped_and_normalised_as_the_model_was_trained():
    model = toy_vit()
    model.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.125)}
    x = model_transform(model)(Image.new("RGB", (40, 50), (51, 102, 204)))
    assert x.shape == (3, 32, 32)
    wanted = [(0.2 - 0.1) / 0.5, (0.4 - 0.2) / 0.25, (0.8 - 0.3) / 0.125]
    np.testing.assert_allclose(x.mean(dim=(1, 2)), wanted, rtol=1e-5)
    framed = np.zeros((64, 64, 3), dtype=np.uint8)
    framed[12:52, 12:52] = 255
    for crop, darkest in ((0.5, 2.0), (1.0, -2.0)):
        model = toy_vit()
        model.pretrained_cfg |= {"crop_pct": crop}
        seen = model_transform(model)(Image.fromarray(framed))
        assert (seen.min(), seen.max()) == (darkest, 2.0)


def test_models_know_their_classes_and_architecture_or_say_how_to_state_them():
    model = build_model(SMALL_VIT)
    assert class_names(model)[:2] == ("n01440764", "n01443537")
    assert class_labels(model)[:2] == ("tench", "goldfish")
    with pytest.raises(MoeeError, match="--classes FILE"):
        class_names(build_model(SMALL_VIT, num_classes=7))
    with pytest.raises(MoeeError, match=r"timm\.create_model"):
        models.architecture(torch.nn.Linear(2, 2))
