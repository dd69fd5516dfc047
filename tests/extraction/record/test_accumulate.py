from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import accumulate as summing
from moee_analysis.extraction.record import calibration_set as calibrations
from moee_analysis.extraction.record.accumulate import forget, size_of, summed, summed_alone
from moee_analysis.extraction.record.calibration_set import Calibration, Limits
from moee_analysis.utils.storage import checksums as seals
from tests.helpers.makers import best
from tests.helpers.toys import toy_images, toy_vit

if TYPE_CHECKING:
    from moee_analysis.models.loading import MlpSite

IMAGES = 20


@dataclass(frozen=True)
class Totals:
    """Adds up inputs, and counts the tokens."""

    site: MlpSite
    gradients: bool = False
    stops_at: int | None = None

    @property
    def shapes(self):
        return {"inputs": (self.site.dim,), "tokens": ()}

    @property
    def facts(self):
        return {"of": "totals"}

    def add(self, sums, layer):
        if self.stops_at is not None and layer.sample.image[0] == self.stops_at:
            raise KeyboardInterrupt
        sums["inputs"] += torch.from_numpy(layer.sample.inputs.astype(np.float64).sum(axis=0))
        sums["tokens"] += len(layer.sample)


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(calibrations, "PART", 4)
    return Calibration(toy_vit(), toy_images(IMAGES), best().resolved(), tmp_path)


def whole(calibration, site):
    """Inputs of all tokens, one after the other."""
    parts = calibration.parts([site])
    return np.concatenate([part[site.name].sample.inputs for part in parts]).astype(float)


def test_sums_over_parts_are_those_over_all_tokens(tokens):
    tallies = [Totals(site) for site in tokens.sites]
    found = list(summed(tokens, tallies, label="adding"))
    assert [tally for tally, _ in found] == tallies
    for tally, sums in found:
        inputs = whole(tokens, tally.site)
        np.testing.assert_allclose(sums["inputs"], inputs.sum(axis=0), rtol=1e-12)
        assert sums["tokens"] == len(inputs)
        assert sums["inputs"].dtype == torch.float64


def test_one_recorded_layer_is_summed_alone(tokens):
    (part, *_) = tokens.parts(tokens.sites)
    layer = part[tokens.sites[0].name]
    sums = summed_alone(Totals(tokens.sites[0]), layer)
    assert sums["tokens"] == len(layer.sample) == 4 * 17


@pytest.mark.parametrize(("memory", "passes"), [(1, 3), (8 * 33, 3), (16 * 33, 2), (1e9, 1)])
def test_as_many_layers_are_summed_at_once_as_fit(tokens, monkeypatch, memory, passes):
    tallies, seen = [Totals(site) for site in tokens.sites], []
    assert {size_of(tally) for tally in tallies} == {8 * 33}
    own = Calibration.parts

    def counted(calibration, sites, **settings):
        seen.append(len(sites))
        return own(calibration, sites, **settings)

    monkeypatch.setattr(Calibration, "parts", counted)
    object.__setattr__(tokens, "limits", Limits(memory=memory))
    assert len(list(summed(tokens, tallies, label="adding"))) == 3
    assert (len(seen), sum(seen)) == (passes, 3)


def test_a_pass_that_was_stopped_goes_on_to_the_same_bits(tokens, monkeypatch):
    monkeypatch.setattr(summing, "SAVED_AFTER", 0.0)
    (_, plain), *_ = summed(tokens, [Totals(tokens.sites[0])], label="adding")
    forget(tokens)
    with pytest.raises(KeyboardInterrupt):
        list(summed(tokens, [Totals(tokens.sites[0], stops_at=12)], label="adding"))
    seen = []
    own = Totals.add

    def noted(tally, sums, layer):
        seen.append(int(layer.sample.image[0]))
        own(tally, sums, layer)

    monkeypatch.setattr(Totals, "add", noted)
    (_, found), *_ = summed(tokens, [Totals(tokens.sites[0])], label="adding")
    assert seen == [12, 16]
    for name, values in plain.items():
        assert torch.equal(values, found[name])
    assert list(tokens.root.glob("sums-*"))
    forget(tokens)
    assert not list(tokens.root.glob("sums-*"))


def test_what_a_stopped_pass_has_saved_belongs_to_its_sums_alone(tokens, monkeypatch):
    monkeypatch.setattr(summing, "SAVED_AFTER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(summed(tokens, [Totals(tokens.sites[0], stops_at=12)], label="adding"))
    (_, found), *_ = summed(tokens, [Totals(tokens.sites[1])], label="adding")
    np.testing.assert_allclose(found["inputs"], whole(tokens, tokens.sites[1]).sum(axis=0))


def test_what_took_long_is_not_summed_again(tokens, monkeypatch):
    monkeypatch.setattr(summing, "SAVED_AFTER", 0.0)
    tallies = [Totals(tokens.sites[0])]
    (_, first), *_ = summed(tokens, tallies, label="adding")
    monkeypatch.setattr(Totals, "add", lambda *_: pytest.fail("again"))
    (_, again), *_ = summed(tokens, tallies, label="adding")
    assert all(torch.equal(values, again[name]) for name, values in first.items())


def test_little_is_saved_of_a_pass_that_takes_no_time(tokens, monkeypatch):
    monkeypatch.setattr(summing, "write_tensors", lambda *_, **__: pytest.fail("saved"))
    assert list(summed(tokens, [Totals(tokens.sites[0])], label="adding"))


def test_a_disk_that_fills_up_is_told_and_loses_nothing(tokens, monkeypatch):
    monkeypatch.setattr(summing, "SAVED_AFTER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(summed(tokens, [Totals(tokens.sites[0], stops_at=12)], label="adding"))
    (saved,) = tokens.root.glob("sums-*/sums.safetensors")
    before = saved.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(seals, "save_file", full)
    with pytest.raises(MoeeError, match="No space left"):
        list(summed(tokens, [Totals(tokens.sites[0])], label="adding"))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("place", [None, 20, -20])
def test_saved_sums_that_are_damaged_are_told_and_made_again(tokens, monkeypatch, capsys, place):
    (_, right), *_ = summed(tokens, [Totals(tokens.sites[0])], label="adding")
    monkeypatch.setattr(summing, "SAVED_AFTER", 0.0)
    with pytest.raises(KeyboardInterrupt):
        list(summed(tokens, [Totals(tokens.sites[0], stops_at=12)], label="adding"))
    (saved,) = tokens.root.glob("sums-*/sums.safetensors")
    content = bytearray(saved.read_bytes())
    if place is not None:
        content[place] ^= 1
    saved.write_bytes(content if place is not None else b"edited")
    (_, found), *_ = summed(tokens, [Totals(tokens.sites[0])], label="adding")
    assert "saved sums are damaged" in capsys.readouterr().out
    assert all(torch.equal(values, found[name]) for name, values in right.items())


def test_nothing_to_add_takes_no_pass():
    assert not list(summed(SimpleNamespace(limits=Limits()), [], label="adding"))
