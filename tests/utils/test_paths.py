from __future__ import annotations

from pathlib import Path

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.utils import paths


def test_the_bundled_model_lies_in_the_data_folder():
    assert (paths.data_folder() / "bundled.safetensors").is_file()


def test_the_store_is_named_by_the_environment_or_lies_in_the_cache(monkeypatch):
    monkeypatch.setenv("MOEE_STORE", "~/mine")
    assert paths.store_folder() == Path.home() / "mine"
    monkeypatch.delenv("MOEE_STORE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert paths.store_folder() == Path("/cache/moee-analysis")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert paths.store_folder() == Path.home() / ".cache" / "moee-analysis"


def test_an_incomplete_installation_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "moee_analysis")
    with pytest.raises(MoeeError, match="install the project again"):
        paths.data_folder()
