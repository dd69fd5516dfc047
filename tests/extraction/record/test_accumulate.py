from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import accumulate as accumulating
from moee_analysis.extraction.record import token_source
from moee_analysis.extraction.record.accumulate import Accumulator, accumulate, saved_sums, size_of
from moee_analysis.extraction.record.token_source import Limits, TokenSource, calibration_tokens
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.storage import checksums
from tests.helpers.images import toy_images
from tests.helpers.layers import sums_of
from tests.helpers.models import toy_vit
from tests.helpers.runs import best


@dataclass(frozen=True)
class Totals(Accumulator):
    """Sums of inputs, and the number of tokens; ``stops_at`` an image, and notes what it saw."""

    site: MlpSite
    stops_at: int | None = None
    gradients: bool = False
    seen: list[int] = field(default_factory=list)

    @property
    def shapes(self):
        return {"inputs": (self.site.dim,), "tokens": ()}

    @property
    def facts(self):
        return {"of": self.site.name}

    def update(self, sums, layer):
        if self.stops_at is not None and layer.sample.image[0] == self.stops_at:
            raise KeyboardInterrupt
        self.seen.append(int(layer.sample.image[0]))
        sums["inputs"] += torch.from_numpy(layer.sample.inputs.astype(np.float64).sum(axis=0))
        sums["tokens"] += len(layer.sample)

    def compute(self, sums):
        return sums


@pytest.fixture
def tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(token_source, "PART", 4)
    return calibration_tokens(toy_vit(), toy_images(20), best().resolved(), root=tmp_path)


@pytest.fixture
def always_saved(monkeypatch):
    monkeypatch.setattr(accumulating, "SAVED_AFTER", 0.0)


def total(tokens, site, **settings):
    ((_, sums),) = accumulate(tokens, [Totals(site, **settings)], label="adding")
    return sums


def stop(tokens):
    """Begin an extraction that is stopped in its fourth part; return the file that it leaves."""
    with pytest.raises(KeyboardInterrupt), saved_sums(tokens):
        total(tokens, tokens.sites[0], stops_at=12)
    (saved,) = tokens.root.glob("sums-*/sums.safetensors")
    return saved


def same(one, other):
    return all(torch.equal(values, other[name]) for name, values in one.items())


def test_sums_over_parts_are_those_over_all_tokens(tokens):
    accumulators = [Totals(site) for site in tokens.sites]
    found = list(accumulate(tokens, accumulators, label="adding"))
    assert [site for site, _ in found] == list(tokens.sites)
    for site, sums in found:
        parts = tokens.parts([site])
        inputs = np.concatenate([part[site.name].sample.inputs for part in parts]).astype(float)
        np.testing.assert_allclose(sums["inputs"], inputs.sum(axis=0), rtol=1e-12)
        assert sums["tokens"] == len(inputs)
        assert sums["inputs"].dtype == torch.float64
    (part, *_) = tokens.parts(tokens.sites)
    layer = part[tokens.sites[0].name]
    assert sums_of(accumulators[0], layer)["tokens"] == len(layer.sample) == 4 * 17
    assert not list(accumulate(SimpleNamespace(limits=Limits()), [], label="adding"))


@pytest.mark.parametrize(("memory", "passes"), [(1, 3), (8 * 33, 3), (16 * 33, 2), (1e9, 1)])
def test_as_many_layers_are_summed_at_once_as_fit(tokens, monkeypatch, memory, passes):
    accumulators, read = [Totals(site) for site in tokens.sites], Mock(side_effect=tokens.parts)
    assert {size_of(each) for each in accumulators} == {8 * 33}
    monkeypatch.setattr(TokenSource, "parts", read)
    limited = replace(tokens, limits=Limits(memory=memory))
    assert len(list(accumulate(limited, accumulators, label="adding"))) == 3
    assert read.call_count == passes
    assert sum(len(call.args[0]) for call in read.call_args_list) == 3


def test_a_pass_that_was_stopped_goes_on_to_the_same_bits(tokens, always_saved):
    with saved_sums(tokens):
        plain = total(tokens, tokens.sites[0])
    assert not list(tokens.root.glob("sums-*"))
    stop(tokens)
    assert total(tokens, tokens.sites[1])["tokens"] == 20 * 17  # saved sums are of one layer alone
    seen = []
    for _ in range(2):  # a whole pass is saved as well
        assert same(plain, total(tokens, tokens.sites[0], seen=seen))
        assert seen == [12, 16]


def test_little_is_saved_of_a_pass_that_takes_no_time(tokens, monkeypatch):
    monkeypatch.setattr(accumulating, "write_tensors", lambda *_, **__: pytest.fail("saved"))
    assert total(tokens, tokens.sites[0])


def test_a_disk_that_fills_up_is_told_and_loses_nothing(tokens, monkeypatch, always_saved):
    saved = stop(tokens)
    before = saved.read_bytes()

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checksums, "save_file", full)
    with pytest.raises(MoeeError, match="No space left"):
        total(tokens, tokens.sites[0])
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


@pytest.mark.parametrize("place", [None, 20, -20])
def test_saved_sums_that_are_damaged_are_told_and_made_again(tokens, always_saved, capsys, place):
    with saved_sums(tokens):
        right = total(tokens, tokens.sites[0])
    saved = stop(tokens)
    content = bytearray(saved.read_bytes() if place else b"edited")
    content[place or 0] ^= 1
    saved.write_bytes(content)
    assert same(right, total(tokens, tokens.sites[0]))
    assert "saved sums are damaged" in capsys.readouterr().out
