"""Any number of processes comes to the same experts."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from moee_analysis.utils import distributed
from moee_analysis.utils.distributed import agreed, all_sum, local_device, own_share, together
from tests.helpers.processes import torchrun


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the models that one process comes to, by run."""
    folder = tmp_path_factory.mktemp("alone")
    done = torchrun(1, "tests.helpers.torchrun", "extract", folder)
    assert done.returncode == 0, done.stderr
    return folder


def check_same(folder, alone, count):
    """Require the same models of all processes, and those of one process alone."""
    for path in folder.glob("*-0.safetensors"):
        first, expected = load_file(path), load_file(alone / path.name)
        others = [load_file(str(path).replace("-0", f"-{rank}")) for rank in range(1, count)]
        assert first.keys() == expected.keys()
        for key, values in first.items():
            assert all(torch.equal(values, other[key]) for other in others), key
            if values.is_floating_point():
                torch.testing.assert_close(values, expected[key], rtol=1e-3, atol=1e-4)
            else:  # which neurons an expert has
                assert torch.equal(values, expected[key]), key


def test_any_number_of_processes_comes_to_the_same_experts(alone, tmp_path):
    done = torchrun(3, "tests.helpers.torchrun", "extract", tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.iterdir())) == 3 * len(list(alone.iterdir())) == 12
    check_same(tmp_path, alone, 3)


def test_a_process_that_fails_ends_the_job_with_its_error(alone, tmp_path):
    done = torchrun(2, "tests.helpers.torchrun", "crash", tmp_path)
    assert done.returncode != 0
    assert "expected a process that works" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"best-{n}.safetensors" for n in range(2)}
    check_same(tmp_path, alone, 2)


def test_the_command_is_one_for_all_processes(tmp_path):
    done = torchrun(
        2, "moee_analysis.cli", "extract", "--recipe", "best", "--preset", "smoke",
        "--macs-reduction", "0.3", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["provenance"]["n_images"] == 160


def test_alone_a_sum_is_what_it_is(monkeypatch):
    values = torch.arange(3.0)
    assert all_sum(values) is values
    assert values.tolist() == [0, 1, 2]
    assert agreed(bool(1))
    assert not agreed(bool(0))
    assert own_share(7) == range(7)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together():
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 13])
@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_shares_are_consecutive_even_and_complete(monkeypatch, count, of):
    shares = []
    monkeypatch.setattr(distributed, "processes", lambda: of)
    for rank in range(of):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        shares.append(own_share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize(
    ("device", "own", "expected"),
    [
        ("cpu", "1", "cpu"),
        ("cuda", None, "cuda"),
        ("cuda", "1", "cuda:1"),
        ("cuda:3", "1", "cuda:3"),
    ],
)
def test_every_process_has_an_accelerator_of_its_own(monkeypatch, device, own, expected):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if own is not None:
        monkeypatch.setenv("LOCAL_RANK", own)
    assert local_device(device) == expected
