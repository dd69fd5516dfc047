import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from moee_analysis import plots
from moee_analysis.errors import MoeeError
from moee_analysis.models import loading as models
from moee_analysis.report.notebook import bench as bench_module
from moee_analysis.report.notebook import results
from moee_analysis.report.notebook.bench import MACS_REDUCTION, open_notebook
from moee_analysis.report.notebook.results import readable
from tests.helpers.images import image_folder
from tests.helpers.models import CLASSES, toy_vit
from tests.helpers.plot_tables import TABLES

PER_CLASS = 8
SCORES = TABLES["accuracy"]
KEPT = "MoEE keeps 50.0 % of the dense top-1 (90.0 %), random 10.0 %."


@pytest.fixture
def folder(tmp_path):
    return str(image_folder(tmp_path / "photos", dict.fromkeys(CLASSES, PER_CLASS)))


@pytest.fixture
def toy_model(monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: toy_vit())


@pytest.fixture
def bench(tmp_path):
    return open_notebook("01_test", preset="smoke", out=str(tmp_path / "out"))


@pytest.fixture
def figure():
    fig, ax = plt.subplots(figsize=(2, 1), dpi=150)
    ax.plot([1, 2])
    plt.close(fig)
    return fig


def written(tmp_path):
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize(
    ("name", "value"),
    [("preset", "smok"), ("preset", 1), ("model", ""), ("weights", 3), ("images", None),
     ("calibration", ""), ("img_size", 0), ("in_chans", 10**6), ("layers", "(3, 4)"),
     ("layers", [-1]), ("layers", [True]), ("layers", [3, 3]), ("layers", [1.0]), ("layers", [[1]]),
     ("layers", None), ("classes", [None]), ("classes", "cat"), ("classes", [""]), ("seed", "0"),
     ("seed", -1), ("seed", 0.5), ("seed", True), ("seed", 2**32), ("out", 1)],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_by_name(name, value):
    with pytest.raises(MoeeError, match=name):
        open_notebook("x", **{name: value})


def test_without_out_nothing_is_written(tmp_path, figure, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = open_notebook("x", preset="smoke")
    bench.record("a", 1)
    bench.table("t", pd.DataFrame({"a": [1]}))
    bench.figure("f", figure)
    bench.finish()
    assert not list(tmp_path.iterdir())
    assert bench.results.content["values"] == {"a": 1}
    assert bench.results.content["parameters"] == {  # without the place of the output
        "model": "bundled", "weights": None, "img_size": None, "in_chans": None,
        "class_file": None, "calibration": None, "images": "bundled", "layers": [], "classes": [],
        "preset": "smoke", "seed": 0,
    }  # fmt: skip


def test_numbers_are_written_at_once_and_as_json(tmp_path, figure, bench):
    bench.record("a", np.float32(0.5))
    bench.record("b", {"x": np.arange(2), 3: (np.int64(4), float("inf"))})
    for wrong, kind in ((figure, "a Figure"), ([object()], "a object")):
        with pytest.raises(MoeeError, match=kind):
            bench.record("c", wrong)
    assert written(tmp_path)["values"] == {"a": 0.5, "b": {"x": [0, 1], "3": [4, None]}}


def test_tables_are_kept_as_csv_and_returned(tmp_path, bench):
    table = pd.DataFrame({"layer": [0, 1], "experts": [4, 7]})
    assert bench.table("experts", table) is table
    bench.table("by_layer", table.set_index("layer"))
    for name in ("experts", "by_layer"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"out/tables/{name}.csv"), table)
    entry = {"file": "tables/experts.csv", "rows": 2, "columns": ["layer", "experts"]}
    assert written(tmp_path)["tables"]["experts"] == entry


def test_figures_are_kept_as_shown_and_returned(tmp_path, figure, bench):
    facts = {"finding": "It rises to 2.", "caption": "a line", "cover": True}
    assert bench.figure("one", figure, **facts) is figure
    with Image.open(tmp_path / "out/figures/one.png") as kept:
        assert kept.width > 200
    assert written(tmp_path)["figures"] == {"one": {"file": "figures/one.png"} | facts}
    assert figure.get_label() == "It rises to 2. a line"
    figure.set_label("It falls.")
    bench.figure("two", figure)  # a label is a finding where none is given
    assert written(tmp_path)["figures"]["two"]["finding"] == "It falls."
    figure.set_label("")
    assert bench.figure("the_name", figure).get_label() == "the name"
    before, panel = written(tmp_path), object()
    assert bench.figure("three", panel, finding="It rises.", cover=True) is panel  # unkept
    for name in ("../x", "a b", "", "a/b", ".x"):
        with pytest.raises(MoeeError, match="a name of letters"):
            bench.figure(name, figure)
    assert written(tmp_path) == before
    assert sorted(path.stem for path in tmp_path.glob("out/*/*")) == ["one", "the_name", "two"]


@pytest.mark.parametrize(
    ("holds", "ours", "words"),
    [(True, False, "✓ holds"), (np.False_, False, "✗ does not hold"),
     (None, True, "◐ holds in part")],
)  # fmt: skip
def test_claims_are_shown_and_kept(tmp_path, bench, holds, ours, words):
    shown = bench.claim("experts are many", "they are 7", holds, ours=ours).data
    assert all(text in shown for text in ("experts are many", "they are 7", words))
    assert ("The paper says" in shown) == (not ours)
    (kept,) = written(tmp_path)["claims"]
    assert (kept["holds"], kept["verdict"], kept["ours"]) == (holds, words, ours)


def test_headline_end_and_caption_tell_the_numbers_and_how_they_were_found(tmp_path, bench):
    assert bench.headline("kept", "most", dense="all").data == "**most** kept (dense: all)"
    assert "number" not in written(tmp_path)["headline"]
    shown = bench.headline("of all", np.float32(0.25), dense="1.25 G", form=".1%").data
    assert shown == "**25.0%** of all (dense: 1.25 G)"
    shown = bench.headline("G MACs", 0.90281, dense="1.25 G").data
    assert shown == "**0.903** G MACs (dense: 1.25 G)"
    kept = {"label": "G MACs", "value": 0.90281, "dense": "1.25 G", "number": 0.90281}
    assert written(tmp_path)["headline"] == kept
    assert bench.answer("there are 7 of them").data == "there are 7 of them"
    assert set(written(tmp_path)) == {"notebook", "parameters", "headline"}  # no answer is kept
    shown = bench.finish().data
    kept = written(tmp_path)["environment"]
    assert kept["versions"]["torch"] in shown
    assert kept["device"] in shown
    assert "preset\u00a0smoke" in shown
    assert kept["seconds"] >= 0
    assert kept["cores"] >= 1
    caption = bench.caption(layer=5, site="MLP input", tokens="patch", n=1500)
    assert caption == (
        "layer 5, MLP input, patch tokens, n = 1\u202f500 images, "
        "model bundled, preset smoke, seed 0 (layers counted from 0)"
    )


def test_it_ends_in_three_lines_of_what_was_found(bench, figure):
    bench.headline("kept", "85 %", dense="91 %")
    long = "in 3 (of 4; all) layers; " + "and so on " * 20
    bench.claim("all layers have clusters.", f"{long}.", None)
    for name in ("one", "two"):
        bench.figure(name, figure, finding=f"Figure {name} has 2 lines.")
    found = [line for line in bench.finish().data.splitlines() if line.startswith("- ")]
    assert found == [
        "- **85 %** kept (dense: 91 %)",
        "- ◐ holds in part: all layers have clusters: in 3 (of 4; all) layers.",
        "- Figure one has 2 lines.",
    ]


def test_bundled_images_come_in_the_preset_s_sizes_and_none_twice(tmp_path, bench):
    assert len(bench.calibration) == bench.preset.calibration_images
    assert len(bench.images) == bench.preset.evaluation_images
    assert len(bench.training) == bench.preset.training_images
    assert written(tmp_path)["images"]["evaluation"]["count"] == len(bench.images)
    assert "bundled scenes" in bench._repr_markdown_()
    sets = [bench.training, bench.calibration, bench.images]
    digests = [{s.source.digest(row) for row in s.rows} for s in sets]
    assert not digests[0] & (digests[1] | digests[2])
    assert not digests[1] & digests[2]


def test_without_a_calibration_set_a_part_of_the_images_is_set_aside(tmp_path, folder):
    model = {"model": "deit_tiny_patch16_224", "preset": "full"}
    bench = open_notebook("x", images=folder, out=str(tmp_path / "out"), **model)
    calibration, evaluation = set(bench.calibration.rows), set(bench.images.rows)
    assert not calibration & evaluation
    assert len(calibration | evaluation) == PER_CLASS * len(CLASSES)
    assert bench.training is bench.calibration
    assert "set aside" in written(tmp_path)["notes"][0]
    assert "set aside" in bench._repr_markdown_()
    bench = open_notebook("x", images=folder, calibration=folder, **model)
    with pytest.raises(MoeeError, match="in two folders"):
        _ = bench.images
    for bundled in models.BUNDLED_MODELS:  # which are calibrated with their own images
        bench = open_notebook("x", model=bundled, images=folder, preset="smoke")
        assert bench.calibration.name == "bundled scenes, calibration"
        assert len(bench.images) == PER_CLASS * len(CLASSES)


def test_unreadable_images_are_noted(tmp_path, folder):
    (tmp_path / "photos" / "ant" / "0.png").write_bytes(b"no image")
    bench = open_notebook("x", images=folder, preset="smoke", out=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="damaged or no picture"):
        assert len(bench.images) == PER_CLASS * len(CLASSES) - 1
    (note,) = written(tmp_path)["notes"]
    assert note.startswith("Skipped of photos: 1 damaged or no picture")
    assert note.endswith(": ant/0.png.")


def test_layers_and_classes_are_the_parameters_or_the_notebook_s_own(toy_model):
    own = open_notebook("x", preset="smoke")
    assert own.choose_layers([0, 2]) == [0, 2]
    given = open_notebook("x", preset="smoke", layers=[1], classes=["fox", 3])
    assert given.choose_layers([0, 2]) == [1]
    assert given.choose_among(["bee"], count=1) == [5, 3]
    lacking = open_notebook("x", preset="smoke", layers=[3], classes=["bees"])
    with pytest.raises(MoeeError, match="layers from 0 to 2"):
        lacking.choose_layers([0])
    with pytest.raises(MoeeError, match="did you mean bee"):
        lacking.choose_among([], count=1)


def test_choose_among_prefers_what_the_images_show(bench):
    chosen = bench.choose_among(["cliff", "no such class", "goldfish"], count=3)
    labels = models.class_labels(bench.dense)
    assert [labels[c] for c in chosen[:2]] == ["cliff", "goldfish"]
    assert len(set(chosen)) == 3


def test_the_run_is_the_paper_s_at_the_paper_s_budget_and_goes_through_the_store(
    toy_model, bench, monkeypatch, tmp_path
):
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    monkeypatch.setattr(bench_module, "extract", lambda *given, **options: (given, options))
    small = open_notebook("x", preset="smoke", seed=5)
    (model, images, config), options = small.run
    assert model is small.dense
    assert images is small.calibration
    assert (config.recipe, config.macs_reduction) == ("paper", small.saving)
    assert (config.preset, config.seed) == ("smoke", 5)
    assert options == {"store": tmp_path}
    assert small.run is small.run
    assert small.saving < MACS_REDUCTION  # MLPs are a small part of this model
    monkeypatch.undo()
    assert bench.saving == MACS_REDUCTION


@pytest.fixture
def show(monkeypatch):
    """What a notebook shows of an object: data and metadata by kind."""
    shell = InteractiveShell()
    monkeypatch.setattr(results, "get_ipython", lambda: shell)
    results.prepare_display()
    return shell.display_formatter.format


def test_a_notebook_shows_figures_in_inches_described_and_tables_without_a_mere_count(show, figure):
    descriptions = []
    for describe in (
        lambda: None,
        lambda: figure.axes[0].set_title("a title"),
        lambda: figure.text(0, 0, "words\nbelow"),
        lambda: figure.set_label("a label"),
    ):
        describe()
        data, metadata = show(figure, include=["image/png"])
        assert data["image/png"]
        assert metadata["image/png"]["width"] == pytest.approx(2 * 96, rel=0.1)
        descriptions.append(metadata["image/png"]["alt"])
    assert descriptions == ["figure", "a title", "words below", "a label"]
    table = pd.DataFrame({"layer": [0], "share": [0.123456]})
    shown = show(table)[0]["text/html"]
    assert "0.123" in shown
    assert "<th>0</th>" not in shown
    assert "<th>0</th>" in show(table.set_index("layer"))[0]["text/html"]


def test_numbers_are_readable():
    values = [0.5, 12.34, 123.4, 1234567, 7, True, "38 %", None]
    assert list(map(readable, values)) == [
        "0.500", "12.3", "123", "1\u202f234\u202f567", "7", "True", "38 %", "not defined",
    ]  # fmt: skip


def test_show_keeps_table_figure_and_finding_with_one_caption(tmp_path, bench):
    table = SCORES.copy()
    table.attrs["caption"] = "What the measure says"
    fig = bench.show("both", plots.accuracy, table, layer=3, n=7)
    below = " ".join(fig.texts[-1].get_text().split())
    assert below.startswith("layer 3, n = 7 images")
    assert below.endswith("What the measure says")
    found = written(tmp_path)
    assert "both" in found["tables"]
    entry = found["figures"]["both"]
    assert entry["finding"] == KEPT
    assert fig.get_label() == f"{KEPT} {entry['caption']}"
    drawn = bench.draw(plots.accuracy, SCORES, caption="of a test")  # in passing, and not kept
    assert drawn.get_label() == f"{KEPT} of a test"
    with pytest.raises(MoeeError, match="no_such_plot"):
        bench.show("both", no_such_plot, SCORES)
    assert written(tmp_path) == found


def no_such_plot(table, *, caption):
    pytest.fail("a plot without a finding is refused before it draws")
