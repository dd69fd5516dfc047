"""Real weights and real photographs, where there are any."""

import pytest
import torch

from moee_analysis.data.images import load_images
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.loading import class_names, load_model
from moee_analysis.models.macs import count
from tests.helpers.runs import quick

NAME = "deit_tiny_patch16_224"


@pytest.fixture(scope="module")
def model(assets):
    return load_model(NAME, weights=assets / "weights" / f"{NAME}.safetensors")


@pytest.fixture(scope="module")
def evaluation(assets):
    return assets / "imagenet" / "evaluation"


def test_430_class_folders_map_to_the_indices_of_1000_classes(model, evaluation):
    images = load_images(evaluation, limit=430)  # even over the classes, so one of each
    labels = images.labels(model)
    assert len(set(labels)) == len(set(images.folders)) == 430
    assert labels.max() > 900
    names = class_names(model)
    assert [names[label] for label in labels] == list(images.folders)


def test_the_dense_model_classifies_photographs(model, evaluation):
    images = load_images(evaluation, limit=150)
    labels = torch.from_numpy(images.labels(model))
    with torch.inference_mode():
        found = torch.cat([model(x).argmax(dim=1) for x in images.batches(model)])
    assert (found == labels).float().mean() > 0.75


def test_all_experts_of_a_real_model_are_the_model(model, assets):
    images = load_images(assets / "imagenet" / "calibration", limit=32)
    run = extract(model, images, quick(variance_kept=1.0))
    assert [layer.experts > 1 for layer in run.layers].count(True) >= 2
    x = next(images.batches(model, batch_size=8))
    with torch.inference_mode():
        torch.testing.assert_close(run.model(x), model(x), rtol=0, atol=1e-5)


def test_the_published_cost_of_the_dense_model_is_counted(model):
    assert count(model).total == pytest.approx(1.254e9, rel=1e-3)


def test_64_pixel_photographs_are_enlarged_to_the_models_input(model, assets):
    images = load_images(assets / "tiny-imagenet", limit=8)
    assert images.picture(0).size == (64, 64)
    assert next(images.batches(model)).shape == (8, 3, 224, 224)
    assert sorted(set(images.folders)) == sorted(
        class_names(model)[i] for i in images.labels(model)
    )
