from __future__ import annotations

import json

import pandas as pd
import pytest

from tests.helpers.processes import benchmark

FAST = ["--steps", "2", "--batch-size", "4", "--check-every", "1", "--calibration", "10"]
FEW = ["--limit", "12", "--evaluated", "10", "--seeds", "0", "1"]


@pytest.fixture(scope="module")
def script():
    with benchmark("jetpack") as module:
        yield module


@pytest.fixture(scope="module")
def made(script, tmp_path_factory):
    root = tmp_path_factory.mktemp("jetpack")
    folders = ["--store", str(root / "store"), "--out", str(root / "out")]
    script.main([*FAST, *FEW, "--parts", "components", "--classes", "pug", "cat", *folders])
    return root


def test_every_start_is_trained_with_every_seed_and_all_files_are_written(made):
    names = {"components_curves", "components_ends", "components_differences", "contributions"}
    expected = {f"{name}.{kind}" for name in names for kind in ("csv", "png")}
    assert {p.name for p in (made / "out").iterdir()} == expected | {"jetpack.json", "jetpack.md"}
    curves = pd.read_csv(made / "out" / "components_curves.csv")
    assert len(curves) == 6 * 2 * 3
    content = json.loads((made / "out" / "jetpack.json").read_text())
    assert content["facts"]["recipe"]["steps"] == 2
    assert [row["start"] for row in content["rows"]["components"]] == list(
        dict.fromkeys(curves["start"])
    )
    lines = (made / "out" / "jetpack.md").read_text().splitlines()
    assert sum(line.startswith("| MoE Jetpack |") for line in lines) == 1
    contributed = pd.read_csv(made / "out" / "contributions.csv")
    assert set(contributed["seed"]) == {0, 1}


def test_what_was_trained_is_not_trained_again(script, made):
    before = {path: path.stat().st_mtime_ns for path in (made / "store").glob("trained-*/*")}
    folders = ["--store", str(made / "store"), "--out", str(made / "again")]
    script.main([*FAST, *FEW, "--parts", "components", "--classes", "pug", "cat", *folders])
    assert len(before) == 6 * 2 * 5
    after = {path: path.stat().st_mtime_ns for path in (made / "store").glob("trained-*/*")}
    assert after == before
    first, again = ((made / name / "jetpack.md").read_text() for name in ("out", "again"))
    assert first == again


def test_a_model_that_cannot_be_narrowed_is_told_in_one_line(script, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main([*FAST, *FEW, "--model", "bundled_swin", "--out", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert "VisionTransformer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
