"""Folders of the project and of the user; caches for libraries that cannot write their own."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from moee_analysis.cli import doctor
from moee_analysis.errors import MoeeError
from moee_analysis.utils import environment

TOLD = "HOME", "USER", "NUMBA_CACHE_DIR", "MPLCONFIGDIR"


def test_folders_of_the_project_are_found_or_the_installation_is_incomplete(monkeypatch, tmp_path):
    assert (environment.own_folder("data") / "bundled.safetensors").is_file()
    monkeypatch.setattr(environment, "_ROOMS", tmp_path / "moee_analysis")
    with pytest.raises(MoeeError, match="install the project again"):
        environment.own_folder("data")


def test_the_store_is_named_by_the_environment_or_lies_in_the_cache(monkeypatch):
    monkeypatch.setenv("MOEE_STORE", "~/mine")
    assert environment.store_folder() == Path.home() / "mine"
    monkeypatch.delenv("MOEE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert environment.store_folder() == Path("/cache/moee-analysis")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert environment.store_folder() == Path.home() / ".cache" / "moee-analysis"


def found(name):
    """What the doctor finds of one part."""
    return next(each for each in doctor._places() if each.name == name)


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """A machine on which nothing but the temporary folder can be written, and nobody has a name."""
    allowed = tmp_path / "temporary"
    allowed.mkdir()
    for name in (*TOLD, "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "MOEE_STORE"):
        monkeypatch.delenv(name, raising=False)

    def nobody(_number):
        raise KeyError("uid not found")

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    def writable(place, mode):
        return not mode & os.W_OK or Path(place).is_relative_to(allowed)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.setattr(Path, "expanduser", lambda path: homeless() if "~" in str(path) else path)
    monkeypatch.setattr(os, "access", writable)
    monkeypatch.setattr(tempfile, "tempdir", str(allowed))
    return allowed


def test_who_has_no_home_gets_caches_of_their_own(bare):
    environment.prepare_caches()
    private = bare / f"moee-analysis-{os.getuid()}"
    assert private.stat().st_mode & 0o777 == 0o700
    assert os.environ["NUMBA_CACHE_DIR"] == str(private / "numba")
    assert os.environ["MPLCONFIGDIR"] == str(private / "matplotlib")
    assert os.environ["HOME"] == str(private)
    assert os.environ["USER"] == f"user{os.getuid()}"
    assert environment.check_numba_cache() == str(private / "numba")


def test_what_is_set_stays(bare, monkeypatch):
    given = {name: str(bare / name) for name in ("NUMBA_CACHE_DIR", "MPLCONFIGDIR")}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOGNAME", "ada")
    environment.prepare_caches()
    assert {name: os.environ[name] for name in given} == given
    assert "USER" not in os.environ


def test_a_folder_that_another_user_prepared_is_not_trusted(bare):
    trap = bare / f"moee-analysis-{os.getuid()}"
    trap.mkdir()
    trap.chmod(0o777)
    environment.prepare_caches()
    assert not os.environ["NUMBA_CACHE_DIR"].startswith(f"{trap}/")
    assert Path(os.environ["NUMBA_CACHE_DIR"]).parent.stat().st_mode & 0o077 == 0


def test_a_cache_that_cannot_be_written_names_the_variable(bare, monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(MoeeError, match="set NUMBA_CACHE_DIR"):
        environment.check_numba_cache()
    check = found("numba's cache")
    assert not check.ok
    assert "NUMBA_CACHE_DIR" in check.advice


def test_a_store_without_a_home_names_its_variable(bare):
    with pytest.raises(MoeeError, match="set MOEE_STORE"):
        environment.store_folder()
    store = found("store")
    assert not store.ok
    assert "MOEE_STORE" in store.advice


def test_a_store_that_cannot_be_written_is_found_by_the_doctor(bare, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("MOEE_STORE", str(tmp_path / "file" / "store"))
    assert not found("store").ok
    monkeypatch.setenv("MOEE_STORE", str(bare / "store"))
    assert found("store").ok


def test_who_has_a_home_keeps_everything_as_it_was(tmp_path):
    kept = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "USER": "ada"}
    code = f"import moee_analysis, os; print({{n: os.environ.get(n) for n in {TOLD}}})"
    told = subprocess.run(
        [sys.executable, "-c", code], env=kept, capture_output=True, text=True, check=True
    ).stdout
    assert told.strip() == str(
        {"HOME": str(tmp_path), "USER": "ada", "NUMBA_CACHE_DIR": None, "MPLCONFIGDIR": None}
    )


def test_a_container_s_share_of_memory_is_what_there_is(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "CGROUPS", tmp_path)
    total, free = environment.memory()
    assert 0 < free < total
    (tmp_path / "memory.max").write_text("max\n")
    assert environment.memory()[0] == total
    (tmp_path / "memory.max").write_text("1000000\n")
    assert environment.memory() == (1_000_000, 1_000_000)
