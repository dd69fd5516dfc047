from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.latency import drawn, in_turn
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit

module = sys.modules[
    "moee_analysis.measure.evaluation.latency"
]  # ``measure.latency`` is the function
IMAGES = toy_images(36)


@pytest.fixture
def no_clock(monkeypatch):
    """Times that no clock has measured: as many milliseconds as a model has blocks."""
    monkeypatch.setattr(
        module, "milliseconds", lambda model, *_inputs, **_options: float(len(model.blocks))
    )


def test_times_are_ratios_to_the_reference(no_clock):
    models = {"half": toy_vit(depth=2), "same": toy_vit(depth=4)}
    table = measure.latency(models, IMAGES, reference=toy_vit(depth=4), batch_size=9)
    assert table["system"].tolist() == ["half", "same"]
    assert table["speed_up"].tolist() == [2.0, 1.0]
    assert table["ms"].tolist() == [2.0, 4.0]
    assert set(table["batch_size"]) == {9}


def test_models_keep_their_training_flags(no_clock):
    own, reference = toy_vit(depth=1).train(), toy_vit(depth=1).train()
    measure.latency({"own": own}, IMAGES, reference=reference, rounds=1)
    assert own.training
    assert reference.training


def test_a_round_that_was_disturbed_does_not_count(monkeypatch):
    own, reference = toy_vit(depth=1), toy_vit(depth=1)
    times = {own: iter([9.0, 2.0, 2.5]), reference: iter([4.0, 4.5, 40.0])}
    monkeypatch.setattr(
        module, "milliseconds", lambda model, *_inputs, **_options: next(times[model])
    )
    row = measure.latency({"own": own}, IMAGES, reference=reference, rounds=3).iloc[0]
    assert (row["ms"], row["speed_up"]) == (2.0, 2.0)
    assert (row["slowest"], row["fastest"]) == (pytest.approx(4 / 9), 16.0)


def test_every_model_is_really_called():
    calls = dict.fromkeys(("own", "reference"), 0)

    def count(name):
        calls[name] += 1

    own, reference = toy_vit(depth=1), toy_vit(depth=1)
    own.register_forward_hook(lambda *_: count("own"))
    reference.register_forward_hook(lambda *_: count("reference"))
    table = measure.latency({"own": own}, IMAGES, reference=reference, rounds=2, seconds=0.0001)
    assert min(calls.values()) > 2
    assert table["ms"].item() > 0


def test_batches_are_of_different_images_and_each_is_even_over_the_classes():
    dense = toy_vit(depth=1)
    batches = drawn(IMAGES, 9, dense)
    assert [len(batch) for batch in batches] == [9] * 4
    every = torch.cat(list(IMAGES.batches(dense)))
    assert torch.equal(torch.cat(batches), torch.cat([every[start::4] for start in range(4)]))
    assert len(drawn(IMAGES, 36, dense)) == 1


def test_every_other_round_goes_backwards(monkeypatch):
    monkeypatch.setattr(module, "milliseconds", lambda *_args, **_options: 1.0)
    models = {name: nn.Identity() for name in "abc"}
    orders = ["".join(in_turn(models, [], number, seconds=0)) for number in range(3)]
    assert orders == ["abc", "cba", "abc"]


def test_a_batch_needs_as_many_images():
    with pytest.raises(MoeeError, match="37 images for a batch"):
        drawn(IMAGES, 37, toy_vit(depth=1))
    with pytest.raises(MoeeError, match="at least one image"):
        measure.latency({}, IMAGES.take([]), reference=toy_vit(depth=1))
