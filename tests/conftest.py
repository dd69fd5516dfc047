"""What several test files share: a small extraction, its saved form, and real photographs."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from moee_analysis.extraction.pipeline import extract
from tests.helpers.makers import lively, quick
from tests.helpers.toys import toy_images

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [] if os.environ.get("MOEE_CHROMIUM") else ["browser"]


@pytest.fixture(scope="session")
def small_run():
    """A random ViT of timm's, taken apart; not to be changed."""
    return extract(lively(), toy_images(), quick())


@pytest.fixture(scope="session")
def _saved(small_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "run"
    small_run.save(folder)
    return folder


@pytest.fixture
def saved_run(_saved, tmp_path):
    """A saved run that a test may damage."""
    return Path(shutil.copytree(_saved, tmp_path / "run"))


@pytest.fixture(scope="session")
def assets():
    """Folder of real weights and photographs; skips where there is none."""
    folder = Path(os.environ.get("MOEE_ASSETS") or ROOT.parent / "shared" / "assets")
    if not (folder / "weights").is_dir():
        pytest.skip(f"no real weights and photographs in {folder} (set MOEE_ASSETS)")
    return folder
