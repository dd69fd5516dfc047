import architectures
import pytest
import torch

from moee_analysis.models.loading import build_model, find_mlps
from tests.conftest import ROOT
from tests.helpers.families import FAMILIES

LINES = (ROOT / "docs" / "architectures.md").read_text().splitlines()
QUICK = "DeiT", "DINOv3", "Swin", "Hiera", "MobileViT", "MLP-Mixer", "EVA-02", "PoolFormer"


@pytest.mark.parametrize("family", QUICK)
def test_a_row_of_the_committed_table_is_what_comes_out(family):
    assert architectures.table([architectures.row(family)]).splitlines()[-1] in LINES


def test_the_command_prints_rows_or_writes_the_file(tmp_path, capsys):
    architectures.main(["--families", "PoolFormer", "LeViT"])
    printed = capsys.readouterr().out
    assert "| PoolFormer | `poolformer_s12` | 0 |" in printed
    assert "| 12 Mlp (Conv2d, Identity): convolutional: made of convolutions" in printed
    architectures.main(["--families", "PoolFormer", "LeViT", "--out", str(tmp_path / "table.md")])
    written = (tmp_path / "table.md").read_text()
    assert written.endswith(printed)
    assert "--out docs/architectures.md" in written


def test_every_architecture_that_is_said_to_work_is_tested():
    with torch.device("meta"):
        tested = {type(build_model(name)) for name in FAMILIES}
        models = {family: build_model(name) for family, name in architectures.FAMILIES.items()}
    rows = [line for line in LINES if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == list(models)
    for row, model in zip(rows, models.values(), strict=True):
        if "| paper, best |" in row:
            assert type(model) in tested
            assert find_mlps(model)
        else:
            assert "| no recipe |" in row
