from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import model_transform
from moee_analysis.training import augmentation as training_images
from moee_analysis.training.augmentation import (
    AUGMENTATIONS,
    Augmented,
    epoch_batches,
    seeded,
    training_transform,
)
from moee_analysis.utils import distributed
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit

CPU = torch.device("cpu")


def epoch(number=1, *, augmentation="light", count=10, seed=0):
    return Augmented(toy_images(count), training_transform(toy_vit(), augmentation), seed, number)


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


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_an_image_of_an_epoch_is_always_the_same(augmentation):
    seen = epoch(augmentation=augmentation)
    assert seen[3].shape == (3, 32, 32)
    torch.rand(5)
    assert torch.equal(seen[3], epoch(augmentation=augmentation)[3])


@pytest.mark.parametrize("augmentation", ["light", "strong"])
def test_epochs_and_seeds_see_other_images(augmentation):
    one = epoch(augmentation=augmentation)
    for other in (epoch(2, augmentation=augmentation), epoch(augmentation=augmentation, seed=1)):
        assert sum(torch.equal(a, b) for a, b in zip(one, other, strict=True)) < 3


def test_without_augmentation_images_are_as_they_are_evaluated():
    model = toy_vit()
    wanted = model_transform(model)(toy_images().picture(4))
    assert torch.equal(epoch(augmentation="none")[4], wanted)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(MoeeError, match="none, light, strong"):
        training_transform(toy_vit(), "heavy")


def test_every_image_is_seen_once_an_epoch_in_another_order():
    orders = []
    for number in (1, 2):
        batches = list(epoch_batches(epoch(number, augmentation="none"), 4, device=CPU))
        assert [len(batch) for batch in batches] == [4, 4, 2]
        orders.append([image.sum().item() for image in torch.cat(batches)])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]


def test_processes_share_out_every_batch(monkeypatch):
    (whole,) = [torch.cat(list(epoch_batches(epoch(count=11), 4, device=CPU)))]
    parts = []
    for number in (0, 1):
        monkeypatch.setattr(training_images, "rank", lambda number=number: number)
        monkeypatch.setattr(training_images, "processes", lambda: 2)
        parts.append(list(epoch_batches(epoch(count=11), 4, device=CPU)))
    assert distributed.processes() == 1
    assert [len(batch) for batch in parts[0]] == [2, 2, 2]
    assert [len(batch) for batch in parts[1]] == [2, 2, 1]
    together = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)])
    known = {image.sum().item() for image in whole}
    assert {image.sum().item() for image in together} == known
