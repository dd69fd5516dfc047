import pytest
import torch
from torch.nn import DataParallel
from torch.optim.swa_utils import AveragedModel

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.measure import accuracy, macs
from moee_analysis.models.class_names import name_classes
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import input_size, model_transform
from moee_analysis.models.loading import architecture, class_names, find_mlps
from moee_analysis.models.macs import count
from moee_analysis.models.unwrapping import unwrapped
from tests.helpers.images import toy_images
from tests.helpers.models import CLASSES, TINY, lively, pixels_of, same_models
from tests.helpers.runs import quick


def compiled(model):
    return torch.compile(model, backend="eager")


def with_a_compiled_block(model):
    model.blocks[1] = compiled(model.blocks[1])
    return model


WRAPPINGS = {
    "compiled": compiled,
    "parallel": DataParallel,
    "averaged": AveragedModel,
    "both": lambda model: compiled(DataParallel(model)),
    "a part": with_a_compiled_block,
}


@pytest.fixture(scope="module")
def plain_run():
    """A run of the network as it is."""
    return extract(lively(num_classes=6, **TINY), toy_images(8), quick(experts="one"))


@pytest.fixture(params=WRAPPINGS)
def wrapped(request):
    return WRAPPINGS[request.param](lively(num_classes=6, **TINY))


def test_the_network_inside_is_found(wrapped):
    plain = lively(num_classes=6, **TINY)
    inside = unwrapped(wrapped)
    assert same_models(inside, plain)
    assert fingerprint(wrapped) == fingerprint(plain)
    assert architecture(wrapped) == "test_vit"
    assert input_size(wrapped) == (3, 64, 64)
    assert count(wrapped).total == count(plain).total
    assert [site.name for site in find_mlps(wrapped)] == [site.name for site in find_mlps(plain)]
    assert str(model_transform(wrapped)) == str(model_transform(plain))


def test_nothing_is_changed_to_find_it():
    model = lively()
    assert unwrapped(model) is model
    block = with_a_compiled_block(model).blocks[1]
    assert unwrapped(model) is not model
    assert model.blocks[1] is block


def test_a_wrapped_model_is_taken_apart_saved_and_measured(wrapped, plain_run, tmp_path):
    images = toy_images(8)
    run = extract(wrapped, images, quick(experts="one"))
    run.save(tmp_path / "run")
    loaded = load(tmp_path / "run")
    x = pixels_of(unwrapped(wrapped))
    torch.testing.assert_close(loaded.model(x), run.model(x))
    assert same_models(run.model, plain_run.model)
    assert macs(run, images)["macs"].notna().all()
    name_classes(wrapped, CLASSES)
    assert class_names(wrapped) == CLASSES
    assert accuracy(wrapped, images, resamples=10)["n_images"].item() == 8
