from __future__ import annotations

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image

from moee_analysis import plots
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import pipeline as extraction
from moee_analysis.models import loading as models
from moee_analysis.report.notebook.bench import MACS_REDUCTION, open_notebook
from moee_analysis.report.notebook.display import prepare_display
from moee_analysis.report.results import plain, readable
from tests.helpers.models import CLASSES, toy_vit

PER_CLASS = 8


@pytest.fixture
def folder(tmp_path):
    """A folder of class folders with small noisy images."""
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = rng.integers(0, 255, size=(32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return str(tmp_path / "photos")


@pytest.fixture
def toy_model(monkeypatch):
    monkeypatch.setattr(models, "load_model", lambda *_, **__: toy_vit())


@pytest.fixture
def bench(tmp_path):
    return open_notebook("01_test", preset="smoke", out=str(tmp_path / "out"))


def _written(tmp_path) -> dict:
    return json.loads((tmp_path / "out" / "results.json").read_text())


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"preset": "smok"}, "a preset among smoke, small, full"),
        ({"preset": 1}, "'preset'"),
        ({"model": ""}, "'model'"),
        ({"weights": 3}, "'weights'"),
        ({"images": None}, "'images'"),
        ({"calibration": ""}, "'calibration'"),
        ({"layers": "(3, 4)"}, "'layers'"),
        ({"layers": [-1]}, "'layers'"),
        ({"layers": [True]}, "'layers'"),
        ({"layers": [3, 3]}, "'layers'"),
        ({"layers": [1.0]}, "'layers'"),
        ({"layers": [[1]]}, "'layers'"),
        ({"classes": [None]}, "'classes'"),
        ({"seed": "0"}, "'seed'"),
        ({"seed": -1}, "'seed'"),
        ({"seed": 0.5}, "'seed'"),
        ({"seed": True}, "'seed'"),
        ({"out": 1}, "'out'"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(parameters, match):
    with pytest.raises(MoeeError, match=match):
        open_notebook("x", **parameters)


def test_without_out_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bench = open_notebook("x", preset="smoke")
    bench.record("a", 1)
    bench.table("t", pd.DataFrame({"a": [1]}))
    bench.figure("f", _figure())
    bench.finish()
    assert not list(tmp_path.iterdir())
    assert bench.results.content["values"] == {"a": 1}


def test_parameters_are_kept_without_the_place_of_the_output(tmp_path, bench):
    assert _written(tmp_path)["parameters"] == {
        "model": "bundled",
        "weights": None,
        "img_size": None,
        "in_chans": None,
        "class_file": None,
        "calibration": None,
        "images": "bundled",
        "layers": [],
        "classes": [],
        "preset": "smoke",
        "seed": 0,
    }


def test_numbers_are_written_at_once_and_as_json(tmp_path, bench):
    bench.record("a", np.float32(0.5))
    bench.record("b", {"x": np.arange(2), 3: (np.int64(4), float("inf"))})
    assert _written(tmp_path)["values"] == {"a": 0.5, "b": {"x": [0, 1], "3": [4, None]}}
    with pytest.raises(MoeeError, match="a Figure"):
        bench.record("c", _figure())
    assert set(_written(tmp_path)["values"]) == {"a", "b"}


def test_tables_are_kept_as_csv_and_returned(tmp_path, bench):
    table = pd.DataFrame({"layer": [0, 1], "experts": [4, 7]})
    assert bench.table("experts", table) is table
    bench.table("by_layer", table.set_index("layer"))
    for name in ("experts", "by_layer"):
        pd.testing.assert_frame_equal(pd.read_csv(tmp_path / f"out/tables/{name}.csv"), table)
    assert _written(tmp_path)["tables"]["experts"] == {
        "file": "tables/experts.csv",
        "rows": 2,
        "columns": ["layer", "experts"],
    }


def _figure():
    fig, ax = plt.subplots(figsize=(2, 1), dpi=150)
    ax.plot([1, 2])
    plt.close(fig)
    return fig


def test_figures_are_kept_as_shown_and_returned(tmp_path, bench):
    fig = _figure()
    assert bench.figure("one", fig, finding="It rises to 2.", caption="a line", cover=True) is fig
    with Image.open(tmp_path / "out/figures/one.png") as kept:
        assert kept.width > 200
    told = {"finding": "It rises to 2.", "caption": "a line"}
    entry = {"file": "figures/one.png", "cover": True} | told
    assert _written(tmp_path)["figures"] == {"one": entry}
    assert fig.get_label() == "It rises to 2. a line"


def test_the_label_of_a_figure_is_its_finding_where_none_is_given(tmp_path, bench):
    fig = _figure()
    fig.set_label("It rises to 2.")
    bench.figure("one", fig, caption="a line")
    assert _written(tmp_path)["figures"]["one"]["finding"] == "It rises to 2."
    assert bench.figure("two", _figure()).get_label() == "two"


def test_what_is_no_figure_passes_through_unkept(tmp_path, bench):
    before = _written(tmp_path)
    panel = object()
    assert bench.figure("one", panel, finding="It rises.", cover=True) is panel
    assert _written(tmp_path) == before
    assert not (tmp_path / "out" / "figures").exists()


@pytest.mark.parametrize("name", ["../x", "a b", "", "a/b", ".x"])
def test_a_name_that_is_no_file_name_is_refused(tmp_path, bench, name):
    with pytest.raises(MoeeError, match="a name of letters"):
        bench.figure(name, _figure())
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize(
    ("holds", "words"),
    [(True, "✓ holds"), (np.False_, "✗ does not hold"), (None, "◐ holds in part")],
)
def test_claims_are_shown_and_kept(tmp_path, bench, holds, words):
    shown = bench.claim("experts are many", "they are 7", holds)
    assert all(text in shown.data for text in ("experts are many", "they are 7", words))
    kept = _written(tmp_path)["claims"][0]
    assert kept["holds"] == holds
    assert kept["verdict"] == words
    assert "The paper says" in shown.data
    assert not kept["ours"]


def test_a_claim_of_ours_is_not_the_paper_s(tmp_path, bench):
    shown = bench.claim("pieces help", "they do", None, ours=True)
    assert "The paper says" not in shown.data
    assert _written(tmp_path)["claims"][0]["ours"]


def test_headline_is_shown_and_kept_with_the_dense_model_beside(tmp_path, bench):
    shown = bench.headline("G MACs", 0.90281, dense="1.25 G").data
    assert shown == "**0.903** G MACs (dense: 1.25 G)"
    kept = {"label": "G MACs", "value": 0.90281, "dense": "1.25 G"}
    assert _written(tmp_path)["headline"] == kept
    with pytest.raises(TypeError, match="dense"):
        bench.headline("G MACs", 0.9)


def test_an_answer_is_shown_and_not_kept(tmp_path, bench):
    before = _written(tmp_path)
    assert bench.answer("there are 7 of them").data == "there are 7 of them"
    assert _written(tmp_path) == before


def test_finish_tells_versions_device_time_and_parameters(tmp_path, bench):
    shown = bench.finish().data
    kept = _written(tmp_path)["environment"]
    assert kept["versions"]["torch"] in shown
    assert kept["device"] in shown
    assert "preset\u00a0smoke" in shown
    assert kept["seconds"] >= 0
    assert kept["cores"] >= 1


def test_caption_says_what_is_shown(bench):
    told = bench.caption(layer=5, site="MLP input", tokens="patch", n=1500)
    assert told == (
        "layer 5, MLP input, patch tokens, n = 1\u202f500 images, "
        "model bundled, preset smoke, seed 0 (layers counted from 0)"
    )


def test_bundled_images_come_in_the_preset_s_sizes(tmp_path, bench):
    assert len(bench.calibration) == bench.preset.calibration_images
    assert len(bench.images) == bench.preset.evaluation_images
    assert bench.calibration.name != bench.images.name
    assert _written(tmp_path)["images"]["evaluation"]["count"] == len(bench.images)
    assert "bundled scenes" in bench._repr_markdown_()


def test_without_a_calibration_set_a_part_of_the_images_is_set_aside(tmp_path, folder):
    bench = open_notebook(
        "x", model="deit_tiny_patch16_224", images=folder, preset="full", out=str(tmp_path / "out")
    )
    calibration, evaluation = set(bench.calibration.rows), set(bench.images.rows)
    assert not calibration & evaluation
    assert len(calibration | evaluation) == PER_CLASS * len(CLASSES)
    assert "set aside" in _written(tmp_path)["notes"][0]
    assert "set aside" in bench._repr_markdown_()


@pytest.mark.parametrize("name", models.BUNDLED_MODELS)
def test_a_bundled_model_is_calibrated_with_its_own_images(name, folder):
    bench = open_notebook("x", model=name, images=folder, preset="smoke")
    assert bench.calibration.name == "bundled scenes, calibration"
    assert len(bench.images) == PER_CLASS * len(CLASSES)


def test_one_folder_for_calibration_and_evaluation_is_refused(folder):
    bench = open_notebook("x", model="vit", images=folder, calibration=folder, preset="smoke")
    with pytest.raises(MoeeError, match="in two folders"):
        _ = bench.images


def test_unreadable_images_are_noted(tmp_path, folder):
    (tmp_path / "photos" / "ant" / "0.png").write_bytes(b"no image")
    bench = open_notebook("x", images=folder, preset="smoke", out=str(tmp_path / "out"))
    with pytest.warns(UserWarning, match="damaged or no picture"):
        assert len(bench.images) == PER_CLASS * len(CLASSES) - 1
    (note,) = _written(tmp_path)["notes"]
    assert note.startswith("Skipped of photos: 1 damaged or no picture")
    assert note.endswith(": ant/0.png.")


def test_layers_and_classes_are_the_parameters_or_the_notebook_s_own(toy_model):
    own = open_notebook("x", preset="smoke")
    assert own.choose_layers([0, 2]) == [0, 2]
    assert own.choose_classes(["bee", 3]) == [1, 3]
    given = open_notebook("x", preset="smoke", layers=[1], classes=["fox"])
    assert given.choose_layers([0, 2]) == [1]
    assert given.choose_classes(["bee", 3]) == [5]


def test_layers_and_classes_the_model_lacks_are_refused(toy_model):
    bench = open_notebook("x", preset="smoke", layers=[3], classes=["bees"])
    with pytest.raises(MoeeError, match="layers from 0 to 2"):
        bench.choose_layers([0])
    with pytest.raises(MoeeError, match="did you mean bee"):
        bench.choose_classes([])


def test_the_run_is_the_paper_s_at_the_paper_s_budget_and_goes_through_the_store(
    toy_model, monkeypatch, tmp_path
):
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    monkeypatch.setattr(extraction, "extract", lambda *given, **options: (given, options))
    bench = open_notebook("x", preset="smoke", seed=5)
    (model, images, config), options = bench.run
    assert model is bench.dense
    assert images is bench.calibration
    assert (config.recipe, config.macs_reduction) == ("paper", bench.saving)
    assert (config.preset, config.seed) == ("smoke", 5)
    assert options == {"store": tmp_path}
    assert bench.run is bench.run


@pytest.fixture
def shell(monkeypatch):
    shell = InteractiveShell()
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    prepare_display()
    return shell


def test_a_notebook_shows_figures_in_inches_with_a_description(shell, bench):
    fig = bench.figure("one", _figure(), finding="It rises to 2.", caption="a line")
    data, metadata = shell.display_formatter.format(fig, include=["image/png"])
    assert data["image/png"]
    assert metadata["image/png"]["alt"] == "It rises to 2. a line"
    assert metadata["image/png"]["width"] == pytest.approx(2 * 96, rel=0.1)


def test_a_figure_without_a_label_is_described_by_what_is_written_on_it(shell):
    fig, said = _figure(), []
    for name in ("figure", "a title", "words below"):
        fig.axes[0].set_title("" if name == "figure" else "a title")
        if name == "words below":
            fig.text(0, 0, "words\nbelow")
        metadata = shell.display_formatter.format(fig, include=["image/png"])[1]
        said.append(metadata["image/png"]["alt"])
    assert said == ["figure", "a title", "words below"]


def test_a_notebook_shows_tables_without_a_meaningless_index(shell):
    table = pd.DataFrame({"layer": [0], "share": [0.123456]})
    shown = shell.display_formatter.format(table)[0]["text/html"]
    assert "0.123" in shown
    assert "<th>0</th>" not in shown
    assert "<th>0</th>" in shell.display_formatter.format(table.set_index("layer"))[0]["text/html"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.500"), (12.34, "12.3"), (123.4, "123"), (1234567, "1\u202f234\u202f567"), (7, "7"),
     (True, "True"), ("38 %", "38 %"), (None, "not defined")],
)  # fmt: skip
def test_readable(value, text):
    assert readable(value) == text


def test_plain_refuses_what_json_has_no_type_for():
    with pytest.raises(MoeeError, match="a object"):
        plain([object()])


SCORES = pd.DataFrame(
    {"system": ["dense", "MoEE"], "top1": [0.9, 0.45], "low": 0.4, "high": 0.95,
     "retention": [1.0, 0.5], "retention_low": 0.4, "retention_high": 1.0, "kl": [0.0, 0.3],
     "agreement": [1.0, 0.5], "reference_top1": 0.9, "n_images": 7}
)  # fmt: skip
KEPT = "MoEE keeps 50.0 % of the dense top-1 (90.0 %)."


def test_show_keeps_table_figure_and_finding_with_one_caption(tmp_path, bench):
    table = SCORES.copy()
    table.attrs["caption"] = "What the measure says"
    fig = bench.show("both", plots.accuracy, table, layer=3, n=7)
    written = " ".join(fig.texts[-1].get_text().split())
    assert written.startswith("layer 3, n = 7 images")
    assert written.endswith("What the measure says")
    found = _written(tmp_path)
    assert "both" in found["tables"]
    entry = found["figures"]["both"]
    assert entry["finding"] == KEPT
    assert fig.get_label() == f"{KEPT} {entry['caption']}"


def test_a_plot_without_a_finding_is_refused_before_anything_is_kept(tmp_path, bench):
    def no_such_plot(table, *, caption):
        return _figure()

    before = _written(tmp_path)
    with pytest.raises(MoeeError, match="a function 'no_such_plot' in"):
        bench.show("both", no_such_plot, SCORES)
    assert _written(tmp_path) == before


def test_a_figure_that_is_drawn_in_passing_says_its_finding_and_is_not_kept(tmp_path, bench):
    before = _written(tmp_path)
    fig = bench.draw(plots.accuracy, SCORES, caption="of a test")
    assert fig.get_label() == f"{KEPT} of a test"
    assert _written(tmp_path) == before


def test_choose_among_prefers_what_the_images_show(bench):
    chosen = bench.choose_among(["cliff", "no such class", "goldfish"], count=3)
    labels = models.class_labels(bench.dense)
    assert [labels[c] for c in chosen[:2]] == ["cliff", "goldfish"]
    assert len(set(chosen)) == 3


def test_training_images_of_the_scenes_are_images_of_their_own(bench):
    sets = [bench.training, bench.calibration, bench.images]
    assert len(bench.training) == bench.preset.training_images
    digests = [{s.source.digest(row) for row in s.rows} for s in sets]
    assert not digests[0] & (digests[1] | digests[2])


def test_other_models_are_trained_on_the_calibration_images(toy_model, folder):
    bench = open_notebook("01_test", model="toy", images=folder, preset="smoke")
    assert bench.training is bench.calibration


def test_less_is_saved_where_mlps_are_a_small_part_of_the_model(toy_model):
    assert open_notebook("01_test", model="toy", preset="smoke").saving < MACS_REDUCTION


def test_the_bundled_models_save_what_the_paper_does(bench):
    assert bench.saving == MACS_REDUCTION
