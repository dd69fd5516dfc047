from __future__ import annotations

import pytest
import torch

from moee_analysis.models.loading import build_model, find_mlps
from tests.conftest import ROOT
from tests.helpers.families import FAMILIES
from tests.helpers.processes import benchmark

QUICK = (
    "DeiT",
    "DINOv3",
    "CaiT",
    "Swin",
    "Hiera",
    "MobileViT",
    "MLP-Mixer",
    "EVA-02",
    "PoolFormer",
)


@pytest.fixture(scope="module")
def architectures():
    with benchmark("architectures") as script:
        yield script


@pytest.fixture(scope="module")
def committed():
    return (ROOT / "docs" / "architectures.md").read_text()


def test_the_committed_table_has_every_family_once(architectures, committed):
    lines = [line for line in committed.splitlines() if line.startswith("| ")]
    families = [line.split(" | ")[0].removeprefix("| ") for line in lines[2:]]
    assert families == list(architectures.FAMILIES)


@pytest.mark.parametrize("family", QUICK)
def test_a_row_of_the_committed_table_is_what_comes_out(architectures, committed, family):
    line = architectures.table([architectures.row(family)]).splitlines()[-1]
    assert line in committed.splitlines()


def test_the_command_prints_rows_or_writes_the_file(architectures, tmp_path, capsys):
    architectures.main(["--families", "PoolFormer", "LeViT"])
    printed = capsys.readouterr().out
    assert "| PoolFormer | `poolformer_s12` | 0 |" in printed
    assert "| 12 Mlp (Conv2d, Identity): convolutional: made of convolutions" in printed
    architectures.main(["--families", "PoolFormer", "LeViT", "--out", str(tmp_path / "table.md")])
    written = (tmp_path / "table.md").read_text()
    assert written.endswith(printed)
    assert "--out docs/architectures.md" in written


def test_every_architecture_that_is_said_to_work_is_tested(architectures, committed):
    tested = {type(build_model(name)) for name in FAMILIES}
    for family, name in architectures.FAMILIES.items():
        with torch.device("meta"):
            model = build_model(name)
        (line,) = [line for line in committed.splitlines() if line.startswith(f"| {family} |")]
        if "| paper, best |" in line:
            assert type(model) in tested
            assert find_mlps(model)
        else:
            assert "| no recipe |" in line
