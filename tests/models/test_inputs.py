import numpy as np
import pytest
import timm
import torch
from PIL import Image

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.inputs import blank, data_config, input_size, model_transform
from moee_analysis.models.loading import build_model, load_model
from moee_analysis.models.macs import count
from moee_analysis.moe.layer import moe_layers
from moee_analysis.training.batches import Loaded, training_transform
from moee_analysis.training.finetune import finetune
from tests.helpers.images import picture, toy_images
from tests.helpers.models import (
    CLASSES,
    SMALL_CONVNEXT,
    SMALL_VIT,
    TINY,
    lively,
    pixels_of,
    toy_swin,
    toy_vit,
)
from tests.helpers.runs import best, quick
from tests.training.test_finetune import tuning


@pytest.mark.parametrize(("arguments", "size"), [
    ({}, (3, 160, 160)), ({"img_size": 96}, (3, 96, 96)), ({"in_chans": 1}, (1, 160, 160)),
    ({"img_size": (64, 96), "in_chans": 4}, (4, 64, 96)),
    ({"dynamic_img_size": True}, (3, 160, 160)),
    ({"dynamic_img_size": True, "img_size": 96}, (3, 96, 96)),
])  # fmt: skip
def test_the_size_is_that_the_model_was_built_for(arguments, size):
    for make in (timm.create_model, build_model):
        model = make(SMALL_VIT, **arguments).eval()
        assert input_size(model) == size
        assert blank(model).shape == (1, *size)
        assert next(toy_images(3).batches(model)).shape == (3, *size)


def test_a_model_of_any_size_is_told_its_size():
    model = build_model(SMALL_CONVNEXT, img_size=128)
    assert input_size(model) == (3, 128, 128)
    half = build_model(SMALL_CONVNEXT, img_size=64)
    stages = [count(m).total - count(m).by_module["head"] for m in (model, half)]
    assert stages[0] == pytest.approx(4 * stages[1], rel=0.01)


def test_one_channel_is_the_luminance():
    model = build_model(SMALL_VIT, in_chans=1)
    config = data_config(model)
    of_three = build_model(SMALL_VIT).pretrained_cfg["mean"]
    assert config["mean"] == (pytest.approx(np.mean(of_three)),)
    grey = model_transform(model)(picture(3).convert("L"))
    torch.testing.assert_close(model_transform(model)(picture(3).convert("L").convert("RGB")), grey)
    assert grey.shape == (1, 160, 160)


@pytest.mark.parametrize("channels", [2, 4, 7])
def test_other_channels_are_those_of_the_picture_in_turn(channels):
    seen = model_transform(build_model(SMALL_VIT, in_chans=channels))(picture(3))
    rgb = model_transform(build_model(SMALL_VIT))(picture(3))
    for channel in range(channels):
        torch.testing.assert_close(seen[channel], rgb[channel % 3])


@pytest.mark.parametrize(
    ("channels", "augmentation"), [(1, "none"), (5, "none"), (1, "light"), (5, "strong")]
)
def test_training_prepares_as_many_channels(channels, augmentation):
    model = build_model(SMALL_VIT, in_chans=channels)
    assert training_transform(model, augmentation)(picture(1)).shape == (channels, 160, 160)
    model.reset_classifier(6)
    model.pretrained_cfg["label_names"] = CLASSES
    batch = Loaded.of(toy_images(2), model).batch(slice(0, 2))
    torch.testing.assert_close(batch, next(toy_images(2).batches(model)), atol=0.02, rtol=0)


@pytest.mark.parametrize(("channels", "config"), [(1, best(macs_reduction=0.2)), (4, quick())])
def test_a_model_of_other_channels_is_taken_apart_and_saved(tmp_path, channels, config):
    model = lively(in_chans=channels, **TINY)
    run = extract(model, toy_images(8), config)
    cost = measure.macs(run, toy_images(2)).set_index("component").loc["total"]
    assert cost["macs_dense"] == count(model).total
    run.save(tmp_path / "run")
    x = pixels_of(model)
    assert x.shape == (4, channels, 64, 64)
    torch.testing.assert_close(load(tmp_path / "run").model(x), run.model(x))
    shown = toy_images(2).as_seen(0, model)
    assert Image.fromarray(shown).size == (64, 64)
    assert shown.shape == (64, 64, 3)


# Precision


@pytest.mark.parametrize(("dtype", "make"), [
    (torch.float16, toy_vit), (torch.bfloat16, toy_swin), (torch.float64, toy_vit),
])  # fmt: skip
def test_a_model_of_any_precision_comes_to_the_mixture_of_its_weights(dtype, make):
    images = toy_images(8)
    model = make().to(dtype)
    run = extract(model, images, quick())
    exact = extract(make().to(dtype).float(), images, quick())
    assert {t.dtype for t in run.model.parameters()} == {dtype}
    for index, layer in moe_layers(run.model).items():
        other = moe_layers(exact.model)[index]
        assert torch.equal(layer.neurons, other.neurons)
        assert torch.equal(layer.shares, other.shares)
        assert layer.shares.dtype == torch.float32
    assert {t.dtype for t in model.parameters()} == {dtype}


@pytest.mark.parametrize(("dtype", "config"), [
    (torch.float16, best(macs_reduction=0.2)), (torch.bfloat16, quick()),
    (torch.float64, best(macs_reduction=0.2)),
])  # fmt: skip
def test_it_is_saved_evaluated_and_tuned_in_its_precision(tmp_path, dtype, config):
    torch.save(lively(num_classes=6, **TINY).state_dict(), tmp_path / "w.pth")
    model = load_model(SMALL_VIT, weights=tmp_path / "w.pth", classes=CLASSES, **TINY).to(dtype)
    run = extract(model, toy_images(8), config, store=tmp_path / "store")
    run.save(tmp_path / "run")
    loaded, x = load(tmp_path / "run"), pixels_of(model).to(dtype)
    torch.testing.assert_close(loaded.model(x), run.model(x))
    torch.testing.assert_close(loaded.dense()(x), model(x))
    assert loaded.model(x).dtype == dtype
    others = toy_images(16).take(range(8, 16))
    table = measure.accuracy(run.model, others, reference=model, resamples=10)
    assert table["kl"].notna().all()
    assert len(measure.routing(run, others))
    assert measure.macs(run, others)["macs"].notna().all()
    tuned = finetune(run, others, tuning(epochs=1))
    assert {t.dtype for t in tuned.run.model.parameters()} == {dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_routers_of_half_precision_decide_as_exactly_as_their_centres(dtype):
    run = extract(toy_vit().to(dtype), toy_images(8), quick())
    for layer in moe_layers(run.model).values():
        x = torch.randn(3, 17, 32).to(dtype)
        scores = layer.router.scores(x)
        assert scores.dtype == torch.float32
        centres = torch.nn.functional.normalize(layer.router.centres.double(), dim=1)
        exact = x.flatten(0, 1).double() @ centres.T
        torch.testing.assert_close(layer.router(x)[:, 0], exact.argmax(1))


def test_a_model_of_several_precisions_or_without_values_is_refused():
    model = lively()
    model.norm.half()
    for wrong, words in (
        (model, "one precision; found 2"),
        (lively().to("meta"), "without values"),
    ):
        with pytest.raises(MoeeError, match=words):
            extract(wrong, toy_images(4), quick())
