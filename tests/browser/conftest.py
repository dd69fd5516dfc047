"""A real browser, and what is looked at with it: JupyterLab, a report, an atlas.

Runs by ``make test-browser`` only, which sets ``MOEE_CHROMIUM`` to the browser's place.
"""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright

import moee_analysis as moee
from moee_analysis.report.atlas import write_atlas
from moee_analysis.report.pages.site import write_index
from moee_analysis.report.runner.run_notebooks import report
from moee_analysis.utils import environment

ROOT = Path(__file__).resolve().parents[2]
AXE = ROOT / ".venv" / "browser" / "node_modules" / "axe-core" / "axe.min.js"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
    "--disable-component-update", "--no-first-run",
]  # fmt: skip
SERIOUS = ("serious", "critical")


@pytest.fixture(scope="session")
def chromium():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ["MOEE_CHROMIUM"], args=FLAGS
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(chromium):
    """Open an address in a window of its own; nothing but ``known`` errors may be heard of any."""
    wrong, windows = [], []

    def opened(address, *, width=1280, height=900, scheme="light", known=(), **options):
        def hear(said):
            if said.type == "error" and not any(words in said.text for words in known):
                wrong.append(said.text)

        window = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        )
        windows.append(window)
        page = window.new_page()
        page.on("console", hear)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("response", lambda r: wrong.append(f"{r.status} {r.url}") if r.status > 399 else 0)
        page.goto(address)
        return page

    yield opened
    for window in windows:
        window.close()
    assert wrong == []


@pytest.fixture(scope="session")
def shots():
    """Folder of the screenshots, to be looked at."""
    folder = Path(os.environ.get("MOEE_SCREENSHOTS") or ROOT / "reports" / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def problems(shots):
    """A screenshot of a page opened with ``bypass_csp``, and what axe-core calls serious in it."""
    if not AXE.is_file():
        pytest.skip("no axe-core (npm was not found when the browser tests were set up)")
    script = AXE.read_text(encoding="utf-8")

    def found(page, name):
        page.screenshot(path=shots / f"{name}.png", full_page=True)
        page.evaluate(script)
        # in the dark nothing but the colours is other than in the light
        rules = {"runOnly": ["color-contrast"]} if name.endswith("_dark") else {}
        violations = page.evaluate("rules => axe.run(rules)", rules)["violations"]
        return [
            f"{v['id']}: {v['help']} ({n['target']})"
            for v in violations
            if v["impact"] in SERIOUS
            for n in v["nodes"]
        ]

    return found


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """The store of all that is computed for the browser tests."""
    with set_for_a_while(MOEE_STORE=str(tmp_path_factory.mktemp("store"))):
        yield Path(os.environ["MOEE_STORE"])


@pytest.fixture(scope="session")
def report_folder(store, tmp_path_factory):
    """A report at the smoke preset: of the notebooks ``make test`` has kept, or of two."""
    folder = tmp_path_factory.mktemp("report")
    kept = sorted(Path(os.environ.get("MOEE_KEEP_REPORT", folder)).glob("*/*/page.html"))
    if kept:
        runs = [shutil.copytree(page.parent, folder / page.parent.name) for page in kept]
        write_index(folder, runs, {}, {})
        return folder
    names = ("01_extraction", "03_class_specific_experts")
    chosen = [environment.own_folder("notebooks") / f"{name}.ipynb" for name in names]
    assert all(done.ok for done in report({}, out=folder, preset="smoke", notebooks=chosen))
    return folder


@pytest.fixture(scope="session")
def small_atlas(store):
    """A small extraction of the bundled model, and the images of its atlas."""
    config = moee.ExtractConfig(recipe="paper", macs_reduction=0.28, preset="smoke")
    calibration = moee.load_images("bundled", split="calibration", limit=160)
    run = moee.extract(moee.load_model("bundled"), calibration, config, store=store)
    return run, moee.load_images("bundled", limit=60)


@pytest.fixture(scope="session")
def atlas_file(small_atlas, tmp_path_factory):
    run, images = small_atlas
    out = tmp_path_factory.mktemp("atlas") / "atlas.html"
    return write_atlas(run, images, out, dense=run.dense())


@contextmanager
def set_for_a_while(**variables):
    """Environment variables that are set while this is open."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield
