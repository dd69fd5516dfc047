import random

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import model_transform
from moee_analysis.training import augmentation
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
    (whole,) = [torch.cat(list(epoch_batches(epoch(count=11), 4, device=CPU)))]
    parts = []
    for number in (0, 1):
        monkeypatch.setattr(augmentation, "rank", lambda number=number: number)
        monkeypatch.setattr(augmentation, "processes", lambda: 2)
        parts.append(list(epoch_batches(epoch(count=11), 4, device=CPU)))
    assert distributed.processes() == 1
    assert [len(batch) for batch in parts[0]] == [2, 2, 2]
    assert [len(batch) for batch in parts[1]] == [2, 2, 1]
    together = torch.cat([torch.cat(pair) for pair in zip(*parts, strict=True)])
    known = {image.sum().item() for image in whole}
    assert {image.sum().item() for image in together} == known
