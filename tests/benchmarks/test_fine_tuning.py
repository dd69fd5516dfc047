from __future__ import annotations

import json

import pandas as pd
import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.training.finetune_config import FinetuneConfig
from tests.helpers.images import toy_images
from tests.helpers.models import toy_vit
from tests.helpers.processes import benchmark

IMAGES = toy_images(70)
CONFIG = FinetuneConfig(epochs=1, batch_size=8, learning_rate=1e-5, augmentation="none")


@pytest.fixture(scope="module")
def script():
    with benchmark("fine_tuning") as module:
        yield module


@pytest.fixture
def bench(script, tmp_path):
    sets = IMAGES.take(range(24)), IMAGES.take(range(50, 70))
    return script.Bench(toy_vit(), *sets, preset="smoke", store=tmp_path / "store")


def test_every_system_is_trained_with_every_seed_and_all_files_are_written(script, bench, tmp_path):
    points = [script.Point(0.1), script.Point(0.2)]
    table = script.run(
        bench, IMAGES.take(range(24, 50)), CONFIG, systems=["magnitude", "fisher OBS"],
        points=points, seeds=[0, 1], out=tmp_path / "out",
    )  # fmt: skip
    assert len(table) == 2 * 2 * (1 + 2)
    assert set(table["asked"]) == {"−10 %", "−20 %"}
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert written == {
        "fine_tuning.json", "fine_tuning.csv", "fine_tuning.md", "fine_tuning.png", "history.csv",
        "history.png",
    }  # fmt: skip
    content = json.loads((tmp_path / "out" / "fine_tuning.json").read_text())
    assert content["facts"]["config"]["epochs"] == 1
    assert len(content["rows"]) == len(table)
    curves = pd.read_csv(tmp_path / "out" / "history.csv")
    assert curves["system"].nunique() == 4
    lines = (tmp_path / "out" / "fine_tuning.md").read_text().splitlines()
    assert sum(line.startswith("| magnitude | −20 % | after |") for line in lines) == 1
    assert len([line for line in lines if line.startswith("|")]) == 2 + 2 * 2 * 2


def test_images_that_are_evaluated_are_not_trained_on(script, bench, tmp_path):
    with pytest.raises(MoeeError, match="not trained on"):
        script.run(
            bench, bench.images, CONFIG, systems=["magnitude"], points=[script.Point(0.1)],
            seeds=[0], out=tmp_path / "out",
        )  # fmt: skip
    assert not (tmp_path / "out").exists()
