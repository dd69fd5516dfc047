from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moee_analysis.utils import distributed
from moee_analysis.utils.distributed import agreed, all_sum, local_device, own_share, together
from tests.helpers.torchrun import RUNS


def torchrun(processes, *arguments):
    """Run a module in so many processes, and return what became of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", *map(str, arguments)]
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    return subprocess.run(
        command, env=settings, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """What one, two and three processes come to, by run: one model of every process."""
    found = {name: {} for name in RUNS}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp(f"of_{processes}")
        done = torchrun(processes, "tests.helpers.torchrun", "extract", folder)
        assert done.returncode == 0, done.stderr
        for name in RUNS:
            files = sorted(folder.glob(f"{name}-*.safetensors"))
            assert len(files) == processes
            found[name][processes] = [load_file(file) for file in files]
    return found


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_processes_comes_to_the_same_experts(runs, name):
    (alone,) = runs[name][1]
    for processes in (2, 3):
        first, *others = runs[name][processes]
        assert first.keys() == alone.keys()
        for key, values in first.items():
            assert all(torch.equal(values, other[key]) for other in others), key
            assert values.shape == alone[key].shape, key
            if values.is_floating_point():
                torch.testing.assert_close(values, alone[key], rtol=1e-3, atol=1e-4)
            else:  # which neurons an expert has
                assert torch.equal(values, alone[key]), key


def test_a_process_that_fails_ends_the_job_with_its_error(tmp_path):
    done = torchrun(2, "tests.helpers.torchrun", "crash", tmp_path)
    assert done.returncode != 0
    assert "expected a process that works" in done.stderr
    assert not list(tmp_path.iterdir())


def test_the_command_is_one_for_all_processes(tmp_path):
    done = torchrun(
        2, "moee_analysis.cli", "extract", "--recipe", "best", "--preset", "smoke",
        "--macs-reduction", "0.3", "--out", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("saved to") == 1
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["provenance"]["n_images"] == 160


# Alone, and as if with others


@pytest.fixture
def among(monkeypatch):
    """Make this process believe that it is one of several."""

    def believe(number, of):
        monkeypatch.setattr(distributed, "rank", lambda: number)
        monkeypatch.setattr(distributed, "processes", lambda: of)

    return believe


def test_alone_a_sum_is_what_it_is():
    values = torch.arange(3.0)
    assert all_sum(values) is values
    assert values.tolist() == [0, 1, 2]
    assert agreed(bool(1))
    assert not agreed(bool(0))
    assert own_share(7) == range(7)


@pytest.mark.parametrize("count", [0, 1, 2, 5, 12, 13])
@pytest.mark.parametrize("of", [1, 2, 3, 8])
def test_shares_are_consecutive_even_and_complete(among, count, of):
    shares = []
    for number in range(of):
        among(number, of)
        shares.append(own_share(count))
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_nobody_is_joined_where_nobody_was_started(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with together():
        assert not torch.distributed.is_initialized()


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
