"""Rivals, fine-tuning and MoE Jetpack: benchmarks that compare systems, and train."""

import json

import fine_tuning
import jetpack
import pandas as pd
import pytest
import rivals

from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.comparison import Contest
from moee_analysis.training.config import FinetuneConfig
from tests.helpers.images import contents, toy_images
from tests.helpers.models import toy_vit
from tests.helpers.widened import lively_ones, vit

IMAGES = toy_images(60)
SYSTEMS = ["static: magnitude", "MoEfication: k-means, centre", "Sparse Upcycling: top-1"]
FAST = ["--steps=2", "--batch-size=4", "--check-every=1", "--calibration=10", "--limit=12"]


# Rivals


def test_rivals_are_measured_once_for_each_budget(tmp_path, monkeypatch):
    sets, out = (IMAGES.take(range(24)), IMAGES.take(range(24, 60))), tmp_path / "out"
    dense = toy_vit(depth=2)
    contest = Contest(dense, *sets, "smoke", tmp_path / "store", resamples=20, latency=False)
    asked = {"macs_reductions": [0.2], "seeds": [0], "systems": SYSTEMS, "out": out}
    table = rivals.run(contest, **asked)
    assert contents(out).keys() == {
        "rivals.json", "rivals.csv", "rivals.md", "comparison.png", "routing_controls.png",
    }  # fmt: skip
    content = json.loads((out / "rivals.json").read_text())
    assert [row["system"] for row in content["rows"]] == table["system"].tolist()
    written = pd.read_csv(out / "rivals.csv")["mean"].tolist()
    assert written == pytest.approx(table["mean"].tolist())
    lines = (out / "rivals.md").read_text().splitlines()
    assert {line.split("|")[1].strip() for line in lines if line.startswith("|")} >= set(SYSTEMS)

    both = rivals.run(contest, **asked | {"macs_reductions": [0.2, 0.9]})
    pd.testing.assert_frame_equal(both[both["macs_asked"] == 0.2], table)
    assert "- static: magnitude: expected" in (out / "rivals.md").read_text()
    monkeypatch.setattr(rivals, "compare", None)
    assert len(rivals.run(contest, **asked)) == len(both)
    before = (out / "rivals.json").read_bytes()
    with pytest.raises(MoeeError, match="seeds"):
        rivals.run(contest, **asked | {"seeds": [5]})
    assert (out / "rivals.json").read_bytes() == before


# Fine-tuning


def test_every_system_is_fine_tuned_with_every_seed(tmp_path):
    sets, out = (IMAGES.take(range(24)), IMAGES.take(range(50, 60))), tmp_path / "out"
    config = FinetuneConfig(epochs=1, batch_size=8, learning_rate=1e-5, augmentation="none")
    dense = toy_vit(depth=2)
    bench = fine_tuning.Bench(dense, *sets, preset="smoke", store=tmp_path / "store")
    points = [fine_tuning.Point(0.1), fine_tuning.Point(0.2)]
    asked = {"systems": ["magnitude"], "points": points, "out": out}
    with pytest.raises(MoeeError, match="not trained on"):
        fine_tuning.run(bench, bench.images, config, **asked, seeds=[0])
    assert not out.exists()
    table = fine_tuning.run(bench, IMAGES.take(range(24, 50)), config, **asked, seeds=[0, 1])
    assert len(table) == 2 * (1 + 2)
    assert set(table["asked"]) == {"−10 %", "−20 %"}
    assert contents(out).keys() == {
        "fine_tuning.json", "fine_tuning.csv", "fine_tuning.md", "fine_tuning.png", "history.csv",
        "history.png",
    }  # fmt: skip
    content = json.loads((out / "fine_tuning.json").read_text())
    assert content["facts"]["config"]["epochs"] == 1
    assert len(content["rows"]) == len(table)
    assert pd.read_csv(out / "history.csv")["system"].nunique() == 2
    lines = (out / "fine_tuning.md").read_text().splitlines()
    assert sum(line.startswith("| magnitude | −20 % | after |") for line in lines) == 1
    assert len([line for line in lines if line.startswith("|")]) == 2 + 2 * 2


# MoE Jetpack


def test_every_start_is_trained_once_with_every_seed(tmp_path, monkeypatch):
    make, few = jetpack.JetpackStudy.components, (jetpack.PRETRAINED, jetpack.JETPACK)
    starts = lambda study: {name: make(study)[name] for name in few}  # noqa: E731
    monkeypatch.setattr(jetpack.JetpackStudy, "components", starts)
    dense = lively_ones(vit(4, depth=4))
    dense.pretrained_cfg = dense.pretrained_cfg | {"label_names": ("pug", "cat", *"abcd")}
    monkeypatch.setattr(jetpack, "load_model", lambda _: dense)

    def command(out):
        few = ["--evaluated=10", "--seeds", "0", "1", "--classes", "pug", "cat", "--workers=1"]
        folders = [f"--store={tmp_path / 'store'}", f"--out={tmp_path / out}"]
        jetpack.main([*FAST, *few, "--parts=components", *folders])
        return tmp_path / out

    out, names = command("out"), ("components_curves", "components_ends", "components_differences")
    expected = {f"{name}.{kind}" for name in (*names, "contributions") for kind in ("csv", "png")}
    assert contents(out).keys() == expected | {"jetpack.json", "jetpack.md"}
    curves = pd.read_csv(out / "components_curves.csv")
    assert len(curves) == 2 * 2 * 3
    content = json.loads((out / "jetpack.json").read_text())
    assert content["facts"]["recipe"]["steps"] == 2
    assert [row["start"] for row in content["rows"]["components"]] == list(few)
    assert list(dict.fromkeys(curves["start"])) == list(few)
    lines = (out / "jetpack.md").read_text().splitlines()
    assert sum(line.startswith("| MoE Jetpack |") for line in lines) == 1
    assert set(pd.read_csv(out / "contributions.csv")["seed"]) == {0, 1}

    times = {path: path.stat().st_mtime_ns for path in tmp_path.glob("store/trained-*/*")}
    assert len(times) == 2 * 2 * 5
    again = command("again")
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("store/trained-*/*")} == times
    assert (again / "jetpack.md").read_text() == (out / "jetpack.md").read_text()
