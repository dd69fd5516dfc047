"""Commands that write pages: the report and the atlas."""

import pytest

from moee_analysis import cli
from moee_analysis.models.loading import load_model
from moee_analysis.report import atlas as atlas_package
from moee_analysis.report.runner import run_notebooks
from tests.helpers.calls import refused, run_cli
from tests.helpers.models import SMALL_VIT, same_models


@pytest.fixture
def opened(monkeypatch):
    pages = []
    monkeypatch.setattr(
        "moee_analysis.utils.progress.open_page", lambda page: pages.append(page) or True
    )
    return pages


@pytest.fixture
def asked(opened, monkeypatch):
    """What the atlas would be made of; a page of nothing is written."""
    calls = []

    def write(run, images, out, *, dense):
        calls.append((run, images, dense))
        out.write_text("<!doctype html>")
        return out

    monkeypatch.setattr(atlas_package, "write_atlas", write)
    return calls


def test_an_atlas_is_written_of_some_images_with_the_dense_model(own, run, asked, opened, tmp_path):
    out = tmp_path / "atlas.html"
    command = ["atlas", run, "--images", own / "evaluation", "--out", out, "--limit", 3]
    assert run_cli(*command) == 0
    [(_, images, dense)] = asked
    assert images.folders == ("ant", "yak", "zebra")
    wanted = load_model(SMALL_VIT, weights=own / "tuned.pth", img_size=64, in_chans=1)
    assert same_models(dense, wanted)
    assert opened == []
    assert run_cli(*command, "--open") == 0
    assert opened == [out]


def test_an_atlas_without_the_dense_weights_says_so_in_a_line(saved_run, tmp_path, asked, capsys):
    """Those of a random model are nowhere; but a wrong file that is named is refused."""
    command = ["atlas", saved_run, "--out", tmp_path / "atlas.html"]
    assert run_cli(*command) == 0
    assert asked[0][2] is None
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("without the dense model: expected ")
    assert last == f"atlas: {tmp_path / 'atlas.html'} (0.0 MB)"
    assert "missing.pth" in refused(capsys, *command, "--weights", "missing.pth")
    assert "toaster" in refused(capsys, *command, "--device", "toaster")
    assert len(asked) == 1


@pytest.mark.parametrize("ok", [True, False])
def test_a_report_is_opened_when_it_is_finished(monkeypatch, tmp_path, opened, ok):
    outcome = run_notebooks.Outcome("a", "ok" if ok else "timeout", 1.0, tmp_path)
    monkeypatch.setattr(run_notebooks, "report", lambda *_, **__: [outcome])
    assert cli.main(["report", "--out", str(tmp_path)]) == (0 if ok else 1)
    assert opened == []
    assert cli.main(["report", "--out", str(tmp_path), "--open"]) == (0 if ok else 1)
    assert opened == [tmp_path / "index.html"]


def test_a_report_of_some_notebooks_tells_them_what_is_set(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(run_notebooks, "report", lambda *a, **b: asked.append((a, b)) or [])
    command = ["report", "--out", tmp_path / "out", "--only", "3,01"]
    assert "'classes' to be list" in refused(capsys, *command, "--set", "classes=['a']")
    assert run_cli(*command, "--set", "layers=[2,6]", "--jobs", 2) == 0
    [((given,), options)] = asked
    assert (given["layers"], given["seed"], options["jobs"]) == ([2, 6], 0, 2)
    names = [path.stem for path in options["notebooks"]]
    assert names == ["01_extraction", "03_class_specific_experts"]
    assert "found 'layer'" in refused(capsys, *command, "--set", "layer=2")
    assert "from 0 to" in refused(capsys, *command, "--set", "layers=[-1]")
    assert "0 to 11 of this model; found [99]" in refused(capsys, *command, "--set", "layers=[99]")
    assert "did you mean goldfish" in refused(capsys, *command, "--set", 'classes=["goldfsh"]')
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    assert "20 outputs; found 2" in refused(capsys, *command, "--classes", names)
    assert len(asked) == 1
