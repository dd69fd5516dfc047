from __future__ import annotations

import json

import pandas as pd
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.comparison import Contest
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.helpers.processes import benchmark

IMAGES = toy_images(60)
SYSTEMS = ["static: magnitude", "MoEfication: k-means, centre", "Sparse Upcycling: top-1"]


@pytest.fixture(scope="module")
def script():
    with benchmark("rivals") as module:
        yield module


@pytest.fixture
def contest(tmp_path):
    sets = IMAGES.take(range(24)), IMAGES.take(range(24, 60))
    return Contest(toy_vit(), *sets, "smoke", tmp_path / "store", resamples=20, latency=False)


@pytest.fixture
def asked(tmp_path):
    return {"macs_reductions": [0.2], "seeds": [0, 1], "systems": SYSTEMS, "out": tmp_path / "out"}


def test_all_files_are_written_and_say_the_same(script, contest, asked):
    table = script.run(contest, **asked)
    assert {path.name for path in asked["out"].iterdir()} == {
        "rivals.json", "rivals.csv", "rivals.md", "comparison.png", "routing_controls.png",
    }  # fmt: skip
    content = json.loads((asked["out"] / "rivals.json").read_text())
    assert [row["system"] for row in content["rows"]] == table["system"].tolist()
    assert pd.read_csv(asked["out"] / "rivals.csv")["mean"].tolist() == pytest.approx(
        table["mean"].tolist()
    )
    lines = (asked["out"] / "rivals.md").read_text().splitlines()
    assert {line.split("|")[1].strip() for line in lines if line.startswith("|")} >= set(SYSTEMS)


def test_a_budget_that_is_there_is_not_measured_again(script, contest, asked, monkeypatch):
    first = script.run(contest, **asked)
    both = script.run(contest, **asked | {"macs_reductions": [0.2, 0.9]})
    pd.testing.assert_frame_equal(both[both["macs_asked"] == 0.2], first)
    assert "- static: magnitude: expected" in (asked["out"] / "rivals.md").read_text()
    monkeypatch.setattr(script, "compare", None)
    assert len(script.run(contest, **asked)) == len(both)


def test_results_of_other_seeds_are_left_alone(script, contest, asked):
    script.run(contest, **asked)
    before = (asked["out"] / "rivals.json").read_bytes()
    with pytest.raises(MoeeError, match="seeds"):
        script.run(contest, **asked | {"seeds": [5]})
    assert (asked["out"] / "rivals.json").read_bytes() == before
