"""Any number of processes comes to the same experts."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from moee_analysis.utils import distributed
from moee_analysis.utils.distributed import agreed, all_sum, local_device, own_share, together
from tests.conftest import ROOT
from tests.helpers.processes import new_place, run_command
from tests.helpers.ranks import run_ranks, take_apart


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Folder of the models that one process comes to, by run."""
    folder = tmp_path_factory.mktemp("alone")
    run_ranks(1, take_apart, folder)
    return folder


def check_same(folder, alone, count):
    """Require the same models of all processes, and those of one process alone."""
    for path in folder.glob("*-0.safetensors"):
        first, expected = load_file(path), load_file(alone / path.name)
        name = path.name.removesuffix("0.safetensors")
        others = [load_file(folder / f"{name}{rank}.safetensors") for rank in range(1, count)]
        assert first.keys() == expected.keys()
        for key, values in first.items():
            assert all(torch.equal(values, other[key]) for other in others), key
            if values.is_floating_point():
                torch.testing.assert_close(values, expected[key], rtol=1e-3, atol=1e-4)
            else:  # which neurons an expert has
                assert torch.equal(values, expected[key]), key


def test_any_number_of_processes_comes_to_the_same_experts(alone, tmp_path):
    run_ranks(3, take_apart, tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 * len(list(alone.iterdir())) == 12
    check_same(tmp_path, alone, 3)


def test_a_process_that_fails_ends_the_job_with_its_error(alone, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    done = subprocess.run(
        [*command, "2", "-m", "tests.helpers.ranks", tmp_path],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "expected a process that works" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {f"best-{n}.safetensors" for n in range(2)}
    check_same(tmp_path, alone, 2)


def command_of_rank(argv, place):
    run_command(argv, place / os.environ["RANK"])


def test_the_command_is_one_for_all_processes(tmp_path):
    argv = ["extract", "--recipe", "best", "--preset", "smoke", "--macs-reduction", "0.3", "--out"]
    for rank in range(2):
        new_place(tmp_path / str(rank))
    run_ranks(2, command_of_rank, [*argv, str(tmp_path / "run")], tmp_path)
    printed = [(tmp_path / str(rank) / "printed").read_text() for rank in range(2)]
    assert "saved to" in printed[0]
    assert "saved to" not in printed[1]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["provenance"]["n_images"] == 96


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


@pytest.mark.parametrize(("device", "own", "expected"), [
    ("cpu", "1", "cpu"), ("cuda", None, "cuda"), ("cuda", "1", "cuda:1"), ("cuda:3", "1", "cuda:3"),
])  # fmt: skip
def test_every_process_has_an_accelerator_of_its_own(monkeypatch, device, own, expected):
    monkeypatch.setattr(os, "environ", {} if own is None else {"LOCAL_RANK": own})
    assert local_device(device) == expected
