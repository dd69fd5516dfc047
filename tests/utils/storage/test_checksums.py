"""What is kept carries checksums: every damage is seen."""

import os

import numpy as np
import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage import checksums
from moee_analysis.utils.storage.checksums import SEAL, damage_of, read_seal, seal


def flip(path, place, bit=0):
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


@pytest.fixture
def sealed(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(9))
    (tmp_path / "facts.json").write_text('{"a": 1}')
    seal(tmp_path, tmp_path.name, {"run": "a run"})
    assert not damage_of(tmp_path)
    return tmp_path


def test_every_flipped_bit_of_a_folder_is_seen(sealed):
    rng = np.random.default_rng(0)
    for path in sorted(sealed.iterdir()):
        whole = path.read_bytes()
        for place in rng.integers(len(whole), size=30):
            flip(path, place, rng.integers(8))
            assert damage_of(sealed), (path, place)
            path.write_bytes(whole)
    assert not damage_of(sealed)


def test_files_that_are_missing_strange_or_cut_short_are_named(sealed):
    (sealed / "means.npy").touch()
    assert "means.npy" in damage_of(sealed)
    (sealed / "means.npy").unlink()
    (sealed / ".DS_Store").touch()  # of the system's own
    assert not damage_of(sealed)
    os.truncate(sealed / "labels.npy", 20)
    assert damage_of(sealed) == "labels.npy has changed"
    (sealed / "labels.npy").unlink()
    assert "labels.npy" in damage_of(sealed)
    assert read_seal(sealed).get("about", {}) == {"run": "a run"}
    (sealed / SEAL).write_text("[]")
    assert SEAL in damage_of(sealed)
    assert read_seal(sealed).get("about", {}) == {}


def test_signed_json_is_read_as_it_was_written_or_not_at_all(tmp_path):
    path = tmp_path / "x.json"
    checksums.write_signed(path, {"a": [1, 2.5, None], "b": "c"})
    assert checksums.read_signed(path) == {"a": [1, 2.5, None], "b": "c"}
    path.write_text(path.read_text().replace("2.5", "2.6"))
    with pytest.raises(MoeeError, match="damaged or edited"):
        checksums.read_signed(path)
    for content in ("", "[1]", '{"a": 1}', "null"):
        path.write_text(content)
        with pytest.raises(MoeeError, match=r"x\.json"):
            checksums.read_signed(path)


def test_signed_tensors_are_read_as_they_were_written_or_not_at_all(tmp_path):
    path, rng = tmp_path / "x.safetensors", np.random.default_rng(0)
    tensors = {
        "a": torch.randn(3, 4), "half": torch.ones(5, dtype=torch.bfloat16), "none": torch.ones(0),
        "count": torch.tensor(3),
    }  # fmt: skip
    checksums.write_tensors(path, tensors, {"parts": 2})
    found, facts = checksums.read_signed_tensors(path)
    assert facts == {"parts": 2}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    whole = path.read_bytes()
    for place in rng.integers(len(whole), size=80):
        flip(path, place, rng.integers(8))
        try:
            again, same = checksums.read_signed_tensors(path)
        except MoeeError:
            pass
        else:  # a blank of the header
            assert same == facts
            assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        path.write_bytes(whole)
