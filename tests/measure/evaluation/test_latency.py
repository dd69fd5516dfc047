import sys

import pytest
import torch
from torch import nn

from moee_analysis import measure
from moee_analysis.measure.evaluation.latency import choose_batches, in_turn
from moee_analysis.models.capture import watch
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit

module = sys.modules["moee_analysis.measure.evaluation.latency"]  # the function has this name too
IMAGES = toy_images(36)


@pytest.fixture
def clock(monkeypatch):
    """Give ``milliseconds`` of a model in the place of what a clock would measure."""

    def set_clock(milliseconds):
        monkeypatch.setattr(module, "milliseconds", lambda model, *_, **__: milliseconds(model))

    return set_clock


def test_times_are_ratios_to_the_reference(clock):
    clock(lambda model: float(len(model.blocks)))
    models, dense = {"half": toy_vit(depth=2).train(), "same": toy_vit(depth=4)}, toy_vit(depth=4)
    table = measure.latency(models, IMAGES, reference=dense, batch_size=9)
    rows = table[["system", "speed_up", "ms", "batch_size"]].values.tolist()
    assert rows == [["half", 2.0, 2.0, 9], ["same", 1.0, 4.0, 9]]
    assert models["half"].training


def test_a_round_that_was_disturbed_does_not_count(clock):
    own, reference = toy_vit(depth=1), toy_vit(depth=1)
    times = {own: iter([9.0, 2.0, 2.5]), reference: iter([4.0, 4.5, 40.0])}
    clock(lambda model: next(times[model]))
    row = measure.latency({"own": own}, IMAGES, reference=reference, rounds=3).iloc[0]
    assert (row["ms"], row["speed_up"]) == (2.0, 2.0)
    assert (row["slowest"], row["fastest"]) == (pytest.approx(4 / 9), 16.0)


def test_every_model_is_really_called():
    calls, models = [], {name: toy_vit(depth=1) for name in ("own", "reference")}
    with watch(models, lambda name, _: calls.append(name)):
        table = measure.latency(
            {"own": models["own"]}, IMAGES, reference=models["reference"], rounds=2, seconds=0.0001
        )
    assert min(calls.count(name) for name in models) > 2
    assert table["ms"].item() > 0


def test_batches_are_even_over_the_classes_and_every_other_round_goes_backwards(clock):
    dense = toy_vit(depth=1)
    batches, every = choose_batches(IMAGES, 9, dense), next(IMAGES.batches(dense))
    assert [len(batch) for batch in batches] == [9] * 4
    assert torch.equal(torch.cat(batches), torch.cat([every[start::4] for start in range(4)]))
    assert len(choose_batches(IMAGES, 36, dense)) == 1
    clock(lambda _: 1.0)
    models = {name: nn.Identity() for name in "abc"}
    orders = ["".join(in_turn(models, [], number, seconds=0)) for number in range(3)]
    assert orders == ["abc", "cba", "abc"]
