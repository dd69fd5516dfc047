import random

import numpy as np
import pytest
import torch

from moee_analysis.models.loading import model_transform
from moee_analysis.training import batches
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
from tests.helpers.models import random_states, toy_vit

LABELLED = toy_images(48).take(range(30))


def epoch(number=1, *, name="light", count=10, seed=0):
    return Augmented(toy_images(count), training_transform(toy_vit(), name), seed, number)


def batches_of(seen):
    return list(epoch_batches(seen, 4, device=torch.device("cpu")))


def test_seeds_decide_what_is_drawn_and_the_states_before_come_back():
    before, drawn = random_states(), []
    for numbers in ((1, 2), (1, 2), (2, 1)):
        with seeded(*numbers):
            drawn.append((random.random(), np.random.random(), torch.rand(1).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1]
    assert not set(drawn[0]) & set(drawn[2])
    with pytest.raises(RuntimeError, match="broken"), seeded(3):
        raise RuntimeError("broken")
    assert random_states() == before


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


def test_every_image_is_seen_once_an_epoch_in_another_order_and_processes_share_batches(
    monkeypatch,
):
    seen = [batches_of(epoch(number, name="none", count=11)) for number in (1, 2)]
    for rank in (0, 1):
        monkeypatch.setattr(batches, "rank", lambda rank=rank: rank)
        monkeypatch.setattr(batches, "processes", lambda: 2)
        seen.append(batches_of(epoch(name="none", count=11)))
    sizes = [[len(batch) for batch in each] for each in seen]
    assert sizes == [[4, 4, 3], [4, 4, 3], [2, 2, 2], [2, 2, 1]]
    one, two, *shares = ([image.sum().item() for image in torch.cat(each)] for each in seen)
    assert one != two
    assert sorted(one) == sorted(two) == sorted(shares[0] + shares[1])


def test_every_pass_shows_every_image_once_and_flips_are_mirror_images():
    model = toy_vit()
    loaded, whole = Loaded.of(LABELLED, model), torch.cat(list(LABELLED.batches(model)))
    config = SupervisedConfig(steps=9, batch_size=10, label_smoothing=0.0)
    parts = zip(*training_batches(loaded, model, config), strict=True)
    x, targets = (torch.cat(part) for part in parts)
    same, mirrored = (
        ((x[:, None] - each) ** 2).flatten(2).mean(2) for each in (whole, whole.flip(3))
    )
    best, which = torch.minimum(same, mirrored).min(dim=1)
    assert best.max() < 1e-10
    assert 20 < (mirrored.min(dim=1).values < 1e-10).sum() < 70
    for each_pass in which.split(30):
        assert sorted(each_pass.tolist()) == list(range(30))
    assert not torch.equal(which[:30], which[30:60])
    assert torch.equal(targets.argmax(dim=1), loaded.labels[which])


def test_labels_are_smoothed_and_mixed():
    loaded, targets = Loaded.of(LABELLED, toy_vit()), []
    for mixup in (0.0, 5.0):
        config = SupervisedConfig(steps=1, batch_size=10, mixup=mixup)
        ((_, found),) = training_batches(loaded, toy_vit(), config)
        assert found.sum(dim=1).tolist() == pytest.approx([1] * 10)
        targets.append(found)
    assert targets[0].max(dim=1).values.tolist() == pytest.approx([0.9 + 0.1 / 6] * 10)
    assert (targets[1] > 0.1).sum() > 10
