"""What several test files share: small extractions, a saved one, and real photographs."""

import os
import shutil
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling

ROOT = Path(__file__).resolve().parents[1]
collect_ignore = [] if os.environ.get("MOEE_CHROMIUM") else ["browser"]


def pytest_collection_modifyitems(items):
    """Let notebooks, which take longest, begin."""
    items.sort(key=lambda item: item.path.name != "test_notebooks.py")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Give the tests of a file, or of a notebook, to one worker: it makes what they share once."""

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file, _, test = nodeid.partition("::")
            return test.partition("[")[2] if file.endswith("test_notebooks.py") else file

    return ByFile(config, log)


@pytest.fixture(scope="session", autouse=True)
def unflushed():
    """No test of this process cuts the power: what it writes need not wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


@pytest.fixture(scope="session")
def shared_store(tmp_path_factory):
    """A store for all tests and workers: what one of them computes, the others find."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "store"


@pytest.fixture(scope="session")
def bundled():
    """The bundled vision transformer, which is trained; not to be changed."""
    from moee_analysis.models.loading import load_model

    return load_model("bundled")


@pytest.fixture(scope="session")
def bundled_images():
    """Few of the bundled scenes, of a split: 40 to calibrate with, 24 others to evaluate."""
    from moee_analysis.data.images import load_images

    sizes = {"calibration": 40, "evaluation": 24}
    return {split: load_images("bundled", split=split).limit(n) for split, n in sizes.items()}


@pytest.fixture(scope="session")
def bundled_run(bundled, bundled_images, shared_store):
    """Take the bundled model apart by a configuration, once for all tests that ask for it.

    The run is not to be changed.
    """
    from moee_analysis.extraction.pipeline import extract

    runs = {}

    def run_by(config):
        key = repr(config)
        if key not in runs:
            runs[key] = extract(bundled, bundled_images["calibration"], config, store=shared_store)
        return runs[key]

    return run_by


@pytest.fixture(scope="session")
def small_run():
    """A random ViT of timm's, taken apart; not to be changed."""
    from moee_analysis.extraction.pipeline import extract
    from tests.helpers.images import toy_images
    from tests.helpers.models import lively
    from tests.helpers.runs import quick

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
