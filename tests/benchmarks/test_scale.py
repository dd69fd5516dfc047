from __future__ import annotations

import importlib
import json

import pytest

from tests.helpers.models import SMALL_VIT
from tests.helpers.processes import benchmark


@pytest.fixture(scope="module")
def scale():
    with benchmark("scale") as script:
        yield script


@pytest.fixture(scope="module")
def tables(scale):
    return importlib.import_module("scale_tables")


def test_the_command_measures_one_model_and_works_out_all(scale, tmp_path):
    names = [SMALL_VIT, "test_vit2"]
    scale.main(["--models", *names, "--images", "8", "--experts", "4", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "scale.json").read_text())
    assert content["facts"]["measured"] == SMALL_VIT
    assert all(seconds > 0 for seconds in content["measured"].values())
    assert list(content["imagenet"]) == list(content["sizes"]) == names
    words = (tmp_path / "scale.md").read_text()
    assert words.count(f"| {SMALL_VIT} |") == 4
    assert "no GPU was measured" in words


def test_sums_are_those_of_a_real_run(scale, tmp_path):
    """Sizes by hand: 6 layers of width 64, 4 experts and that of CLS."""
    model = scale.timm.create_model(SMALL_VIT).eval().requires_grad_(requires_grad=False)
    images = scale.load_images("bundled", split="calibration", limit=2)
    clustering = scale.replace(scale.recipe_named("best")["clustering"], count=4)
    config = scale.ExtractConfig(recipe="best", clustering=clustering)
    found = scale.sizes(model, images, config)
    dim, hidden, drawn = 64, found["hidden"], 8000
    assert found["sums"]["statistics"] == 6 * 8 * (5 * (2 + 2 * hidden + dim**2) + 2 * dim**2 + 2)
    assert found["sums"]["refit"] == 6 * 8 * 2 * hidden**2
    assert found["sums"]["drawing"] == 6 * 8 * (drawn * dim + dim + 2 * dim**2 + 2)
    assert found["passes"] == {"drawing": 1, "statistics": 1, "refit": 1}
    assert found["tokens"] == 6 * 101 * (2 * dim + 2 * (2 * dim + 4))


def sized(macs, tokens, dim, layers=2):
    return {
        "macs": macs, "tokens": tokens, "dim": dim, "layers": layers,
        "memory": {"sums": 1e9, "weights": 2e9}, "sums": {"a": 4e9, "b": 4e9},
        "passes": {"drawing": 1, "statistics": 1, "refit": 1},
    }  # fmt: skip


def test_hours_follow_from_the_seconds_of_one_image(tables):
    speed = {"forward": 1.0, "gradients": 3.0, "clustering of a layer": 3600.0}
    speed |= {f"sums of {name}": 0.5 for name in ("drawing", "statistics", "refit")}
    known = {"small": sized(1e9, 100, 64), "wide": sized(4e9, 200, 128)}
    facts = {"measured": "small", "looked_at": 4, "part": 2}
    one, eight, _ = tables.worked_out(facts, speed, known, "small")
    n = tables.IMAGENET
    assert one["hours_model"] == pytest.approx((3 * (2 * n + 8) + n) / 3600)
    assert one["hours_sums"] == pytest.approx(1.5 * n / 3600)
    assert one["seconds_clusters"] == 7200
    assert one["sent"] == 0
    known["small"]["passes"] = {"drawing": 1, "statistics": 2, "refit": 3}
    more = tables.worked_out(facts, speed, known, "small")[0]
    assert more["hours_model"] == pytest.approx((3 * (3 * n + 8) + 3 * n) / 3600)
    known["small"]["passes"] = known["wide"]["passes"]
    assert eight["hours_model"] == pytest.approx(one["hours_model"] / 8)
    assert eight["seconds_clusters"] == 3600
    assert eight["sent"] == pytest.approx(2 * 7 / 8 * 8e9)
    assert eight["memory"] == one["memory"] == 3e9
    everything = one["hours_model"] + one["hours_sums"]
    assert one["hours_gpu"] == pytest.approx(everything * 1e9 / tables.ASSUMED)
    wide = tables.worked_out(facts, speed, known, "wide")[0]
    assert wide["hours_model"] == pytest.approx(4 * one["hours_model"])
    assert wide["hours_sums"] == pytest.approx((2 * 1.0 + 4 * 0.5) * n / 3600)
