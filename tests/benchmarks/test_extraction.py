from __future__ import annotations

import importlib
import json

import pytest

from tests.helpers.processes import benchmark

FILES = {"extraction.json", "extraction.md", "extraction.png"}


@pytest.fixture(scope="module")
def extraction():
    with benchmark("extraction") as script:
        yield script


@pytest.fixture(scope="module")
def tables(extraction):
    return importlib.import_module("extraction_tables")


@pytest.fixture
def here(extraction, monkeypatch):
    """Processes cost more than what is measured in them here."""
    monkeypatch.setattr(extraction, "apart", lambda function, *args: function(*args))
    return extraction


def test_the_command_measures_every_recipe_on_the_bundled_model(here, tmp_path, capsys):
    here.main(["--sizes", "40", "24", "--preset", "smoke", "--out", str(tmp_path / "out")])
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    text = (tmp_path / "out" / "extraction.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    rows = content["rows"]
    assert [(row["images"], row["recipe"]) for row in rows] == [
        (24, "best"), (24, "paper"), (40, "best"), (40, "paper"),
    ]  # fmt: skip
    for row in rows:
        assert sum(row["stages"].values()) == pytest.approx(row["seconds"], rel=0.05)
        assert row["times"] == pytest.approx(row["seconds"] / row["plain"])
        assert row["disk"] > 0
        assert row["told"] > 0
    known = {"recording", "drawing", "clustering", "statistics", "sizing", "other"}
    assert set(rows[0]["stages"]) == known | {"coherence", "refit"}
    assert set(rows[1]["stages"]) == known
    assert content["facts"]["preset"] == "smoke"
    words = (tmp_path / "out" / "extraction.md").read_text()
    assert words.count("\n| ") == 5
    assert "times a plain pass" in capsys.readouterr().out


def test_bad_input_is_told_in_one_line(here, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        here.main(["--sizes", "100000", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "100000 images" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def row(recipe, images, **stages):
    return {"recipe": recipe, "images": images, "plain": 2.0, "stages": stages}


def test_the_figure_counts_plain_passes(tables):
    table = tables.for_figure(
        [row("best", 10, recording=8.0, other=1.0), row("paper", 10, other=3)]
    )
    assert table["passes"].tolist() == [4, 0.5, 1.5]
    assert table["stage"].tolist() == ["recording", "other", "other"]


def test_one_command_runs_all_benchmarks_of_speed(monkeypatch, tmp_path):
    with benchmark("speed") as speed:
        called = {}
        for name in ("clustering", "extraction", "inference"):
            module = getattr(speed, name)
            monkeypatch.setattr(module, "main", lambda argv, name=name: called.update({name: argv}))
        speed.main(["--weights", "w", "--calibration", "c", "--images", "i", "--out", "o"])
    common = ["--model", "bundled", "--out", "o", "--weights", "w"]
    assert called["clustering"] == [*common, "--images", "c"]
    assert called["extraction"] == [*common, "--calibration", "c", "--preset", "small"]
    assert called["inference"] == [*called["extraction"], "--images", "i"]
