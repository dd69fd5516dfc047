"""Commands that write pages: the report and the atlas."""

from __future__ import annotations

from pathlib import Path

import pytest

from moee_analysis import cli
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.loading import fingerprint, load_model
from moee_analysis.report import atlas as atlas_package
from moee_analysis.report.runner import run_notebooks as report
from moee_analysis.utils import web_browser as browser
from tests.cli.test_cli import refused, run_cli, scenes
from tests.helpers.images import toy_images
from tests.helpers.runs import quick


@pytest.fixture
def opened(monkeypatch):
    pages = []
    monkeypatch.setattr(browser, "open_page", lambda page: pages.append(page) or True)
    return pages


@pytest.fixture
def asked(monkeypatch):
    """What the atlas would be made of; a page of nothing is written."""
    calls = []

    def write(run, images, out, *, dense):
        calls.append((run, images, dense))
        out.write_text("<!doctype html>")
        return out

    monkeypatch.setattr(atlas_package, "write_atlas", write)
    return calls


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The bundled model with one layer taken apart, on disk."""
    folder = tmp_path_factory.mktemp("pages") / "run"
    extract(load_model(), toy_images(24), quick(layers=(10,))).save(folder)
    return folder


def test_an_atlas_is_written_of_some_images_with_the_dense_model(
    run, tmp_path, asked, opened, capsys
):
    out = tmp_path / "atlas.html"
    command = ["atlas", run, "--images", scenes(tmp_path / "scenes"), "--out", out]
    assert run_cli(*command, "--limit", 20) == 0
    [(_, images, dense)] = asked
    assert len(images) == len(set(images.folders)) == 20
    assert fingerprint(dense) == fingerprint(load_model())
    assert capsys.readouterr().out.splitlines()[-1] == f"atlas: {out} (0.0 MB)"
    assert opened == []
    assert run_cli(*command, "--open") == 0
    assert opened == [out]


def test_an_atlas_without_the_dense_weights_says_so_in_a_line(saved_run, tmp_path, asked, capsys):
    """Those of a random model are nowhere; but a wrong file that is named is refused."""
    command = ["atlas", saved_run, "--out", tmp_path / "atlas.html"]
    assert run_cli(*command) == 0
    assert asked[0][2] is None
    assert capsys.readouterr().out.startswith("without the dense model: expected ")
    assert "missing.pth" in refused(capsys, *command, "--weights", "missing.pth")


def test_a_real_atlas_is_one_file_that_fetches_nothing(run, tmp_path, capsys):
    out = tmp_path / "atlas.html"
    assert run_cli("atlas", run, "--limit", 10, "--out", out) == 0
    assert f"atlas: {out} (" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["atlas.html"]
    assert "<html" in out.read_text()


def test_an_atlas_refuses_what_is_wrong_in_one_line(
    saved_run, tmp_path, asked, capsys, monkeypatch
):
    monkeypatch.setattr("moee_analysis.load", lambda _: pytest.fail("too late"))
    assert "a folder" in refused(capsys, "atlas", saved_run, "--out", tmp_path)
    out = tmp_path / "missing" / "atlas.html"
    assert "no folder" in refused(capsys, "atlas", saved_run, "--out", out)
    out = tmp_path / "atlas.html"
    assert "toaster" in refused(capsys, "atlas", saved_run, "--out", out, "--device", "toaster")
    assert asked == []


@pytest.mark.parametrize("ok", [True, False])
def test_a_report_is_opened_when_it_is_finished(monkeypatch, tmp_path, opened, ok):
    outcome = report.Outcome("a", "ok" if ok else "timeout", 1.0, tmp_path)
    monkeypatch.setattr(report, "report", lambda *_, **__: [outcome])
    assert cli.main(["report", "--out", str(tmp_path)]) == (0 if ok else 1)
    assert opened == []
    assert cli.main(["report", "--out", str(tmp_path), "--open"]) == (0 if ok else 1)
    assert opened == [Path(tmp_path) / "index.html"]
