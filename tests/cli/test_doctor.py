"""``moee doctor``: what it finds is so, and what is broken is named with what to do."""

import errno
import json
import os
import tempfile

import psutil
import pytest

from moee_analysis import cli
from moee_analysis.cli import doctor
from moee_analysis.models.loading import load_model


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A real look at this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_STORE", str(tmp_path_factory.mktemp("store")))
        return doctor.examine()


def found(diagnosis, name):
    return next(check.found for check in diagnosis["checks"] if check.name == name)


def test_this_machine_is_well_and_the_one_it_runs_on(healthy):
    assert healthy["ok"]
    text, machine = doctor.as_text(healthy), healthy["machine"]
    assert "All required parts work" in text
    assert healthy["versions"]["torch"] in text
    assert all(check.ok or check.advice for check in healthy["checks"])
    assert 1 <= machine["cores"] <= len(os.sched_getaffinity(0))
    assert machine["memory_free"] < machine["memory"] <= psutil.virtual_memory().total
    assert str(machine["cores"]) in found(healthy, "cores")
    assert "scenes it has never seen" in found(healthy, "bundled model")


def test_a_bundled_model_that_predicts_nonsense_is_broken(monkeypatch):
    wrong = load_model()
    wrong.head.weight.data.neg_()
    monkeypatch.setattr(doctor.moee, "load_model", lambda: wrong)
    check = doctor._bundled_model()
    assert not check.ok
    assert check.required
    assert "install" in check.advice


def test_a_library_that_is_missing_or_too_old_is_named(monkeypatch):
    asked = ["torch>=99", "numpy>=1", "moonbeam>=1", "x; extra=='d'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda _: asked)
    [_, libraries] = doctor._software()
    assert not libraries.ok
    assert all(words in libraries.found for words in ("torch>=99", "moonbeam>=1: not installed"))
    assert "numpy" not in libraries.found


def test_the_store_is_weighed_and_one_that_cannot_be_written_to_is_named(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokens.npy").write_bytes(bytes(25_000_000))
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    store, disk = list(doctor._places())[-2:]
    assert (store.found, disk.found[-13:]) == (f"{tmp_path}: 0.03 GB", "GB free there")
    monkeypatch.setenv("MOEE_STORE", str(tmp_path / "not" / "there"))

    def trial(*_, dir=None, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(dir))

    monkeypatch.setattr(tempfile, "TemporaryFile", trial)
    store = list(doctor._places())[-2]
    assert not store.ok
    assert str(tmp_path) in store.found
    assert "MOEE_STORE" in store.advice
    assert not (tmp_path / "not").exists()


def test_what_is_broken_ends_with_1_and_says_what_to_do(healthy, monkeypatch, capsys):
    """A machine on which one required part does not work, and an optional one is missing."""
    checks = [
        doctor.Check("heart", "silent", ok=False, advice="plug it in"),
        doctor.Check("hat", "none", ok=False, required=False, advice="it is warm anyway"),
    ]
    broken = healthy | {"ok": False, "checks": checks}
    monkeypatch.setattr(doctor, "examine", lambda *_, **__: broken)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert all(text in out for text in ("✗ heart", "plug it in", "· hat"))
    assert out.rstrip().endswith("Does not work: heart. What to do stands below each.")
    assert cli.main(["doctor", "--json"]) == 1
    content = json.loads(capsys.readouterr().out)
    assert not content["ok"]
    assert content["checks"][0]["advice"] == "plug it in"
    assert content["machine"] == healthy["machine"]


def test_another_model_is_looked_at_and_one_that_is_not_there_is_refused(
    capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    assert cli.main(["doctor", "--model", "bundled_swin"]) == 0
    assert "of its MLPs can be taken apart" in capsys.readouterr().out
    assert cli.main(["doctor", "--model", "bundeld"]) == 2
    assert "bundeld" in capsys.readouterr().err
