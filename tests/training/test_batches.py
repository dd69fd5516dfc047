import random

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import model_transform
from moee_analysis.training import batches as training
from moee_analysis.training.batches import (
    AUGMENTATIONS,
    Augmented,
    Loaded,
    epoch_batches,
    seeded,
    training_batches,
    training_transform,
)
from moee_analysis.training.config import SupervisedConfig
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit

TRAINING = toy_images(48).take(range(30))
CPU = torch.device("cpu")


def epoch(number=1, *, name="light", count=10, seed=0):
    return Augmented(toy_images(count), training_transform(toy_vit(), name), seed, number)


def draws():
    return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002


def test_seeds_decide_what_is_drawn_and_the_states_before_come_back():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    with seeded(1, 2):
        first = draws()
    with seeded(1, 2):
        assert draws() == first
    with seeded(2, 1):
        assert not set(draws()) & set(first)
    with pytest.raises(RuntimeError, match="broken"), seeded(3):
        raise RuntimeError("broken")
    assert states == (
        random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    )  # fmt: skip


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_seed_the_epoch_and_the_number_decide_what_is_seen_of_an_image(name):
    one = epoch(name=name)
    assert one[3].shape == (3, 32, 32)
    torch.rand(5)
    assert torch.equal(one[3], epoch(name=name)[3])
    for other in (epoch(2, name=name), epoch(name=name, seed=1)):
        alike = sum(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert alike == 10 if name == "none" else alike < 3


def test_without_augmentation_images_are_as_they_are_evaluated():
    wanted = model_transform(toy_vit())(toy_images().picture(4))
    assert torch.equal(epoch(name="none")[4], wanted)
    with pytest.raises(MoeeError, match="none, light, strong"):
        training_transform(toy_vit(), "heavy")


def test_every_image_is_seen_once_an_epoch_in_another_order():
    orders = []
    for number in (1, 2):
        batches = list(epoch_batches(epoch(number, name="none"), 4, device=CPU))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        orders.append([image.sum().item() for image in torch.cat(batches)])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_processes_share_out_every_batch(monkeypatch):
    whole, parts = torch.cat(list(epoch_batches(epoch(count=11), 4, device=CPU))), []
    for number in (0, 1):
        monkeypatch.setattr(training, "rank", lambda number=number: number)
        monkeypatch.setattr(training, "processes", lambda: 2)
        parts.append(list(epoch_batches(epoch(count=11), 4, device=CPU)))
    assert [[len(batch) for batch in own] for own in parts] == [[2, 2, 2], [2, 2, 1]]
    images = [image.sum().item() for own in parts for batch in own for image in batch]
    assert sorted(images) == sorted(image.sum().item() for image in whole)


def test_every_pass_shows_every_image_once_and_flips_are_mirror_images():
    model = toy_vit()
    loaded = Loaded.of(TRAINING, model)
    whole = torch.cat(list(TRAINING.batches(model)))
    config = SupervisedConfig(steps=9, batch_size=10, label_smoothing=0.0)
    batches = list(training_batches(loaded, model, config))
    x, targets = (torch.cat(part) for part in zip(*batches, strict=True))
    same = ((x[:, None] - whole) ** 2).flatten(2).mean(2)
    mirrored = ((x[:, None] - whole.flip(3)) ** 2).flatten(2).mean(2)
    best, which = torch.minimum(same, mirrored).min(dim=1)
    assert best.max() < 1e-10
    assert 20 < (mirrored.min(dim=1).values < 1e-10).sum() < 70
    for each_pass in which.split(30):
        assert sorted(each_pass.tolist()) == list(range(30))
    assert not torch.equal(which[:30], which[30:60])
    assert torch.equal(targets.argmax(dim=1), loaded.labels[which])


def test_labels_are_smoothed_and_mixed():
    model = toy_vit()
    loaded = Loaded.of(TRAINING, model)
    (_, targets), *_ = training_batches(loaded, model, SupervisedConfig(steps=1, batch_size=10))
    assert targets.sum(dim=1).tolist() == pytest.approx([1] * 10)
    assert targets.max(dim=1).values.tolist() == pytest.approx([0.9 + 0.1 / 6] * 10)
    (_, mixed), *_ = training_batches(
        loaded, model, SupervisedConfig(steps=1, batch_size=10, mixup=5.0)
    )
    assert mixed.sum(dim=1).tolist() == pytest.approx([1] * 10)
    assert (mixed > 0.1).sum() > 10
