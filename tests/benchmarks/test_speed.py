"""Clustering, extraction, what follows for ImageNet, and the command that runs all of them."""

import json
import os
from dataclasses import replace

import clustering
import common
import extraction
import fidelity
import jetpack
import numpy as np
import pytest
import scale
import speed

from tests.helpers.images import contents
from tests.helpers.models import SMALL_VIT, toy_vit
from tests.helpers.runs import CLUSTERING, MEANS

IN_PROCESS = common.in_process


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Processes cost more than what is measured in them here."""
    monkeypatch.setattr(common, "in_process", lambda function, *args: function(*args))


def test_one_command_runs_all_benchmarks_of_speed_each_measurement_in_its_process(monkeypatch):
    assert IN_PROCESS(os.getpid) != os.getpid()
    called = {}
    for name in ("clustering", "extraction", "inference"):
        module = getattr(speed, name)
        monkeypatch.setattr(module, "main", lambda argv, name=name: called.update({name: argv}))
    speed.main(["--weights", "w", "--calibration", "c", "--images", "i", "--out", "o"])
    shared = ["--model", "bundled", "--out", "o", "--weights", "w"]
    assert called["clustering"] == [*shared, "--images", "c"]
    assert called["extraction"] == [*shared, "--calibration", "c", "--preset", "small"]
    assert called["inference"] == [*called["extraction"], "--images", "i"]


@pytest.mark.parametrize(("script", "wrong", "words"), [
    (clustering, ["--limit", "8", "--layer", "40"], "a layer of the model"),
    (clustering, ["--limit", "8", "--sizes", "900"], "520 in 8 images"),
    (extraction, ["--sizes", "100000"], "100000 images"),
    (fidelity, ["--images", "nowhere"], "class folders"),
    (jetpack, ["--model", "bundled_swin", "--limit", "12"], "VisionTransformer"),
])  # fmt: skip
def test_bad_input_is_told_in_one_line(tmp_path, capsys, script, wrong, words):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--out", str(tmp_path / "out"), *wrong])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Clustering


def test_both_systems_cluster_activations_of_the_bundled_model(tmp_path, capsys):
    out = tmp_path / "out"
    asked = ["--limit", "6", "--sizes", "120", "200", "320", "--hdbscan-limit", "200"]
    clustering.main([*asked, "--out", str(out)])
    assert contents(out).keys() == {"clustering.json", "clustering.md", "clustering.png"}
    text = (out / "clustering.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert content["facts"]["layer"] == "blocks.6.mlp"
    assert (content["facts"]["dim"], content["facts"]["tokens"]) == (256, 6 * 65)
    rows = content["rows"]
    assert [(r["tokens"], r["system"]) for r in rows] == [
        (120, "products"), (120, "hdbscan"), (200, "products"), (200, "hdbscan"),
        (320, "products"),
    ]  # fmt: skip
    for ours in (rows[0], rows[2]):
        assert ours["weights_differ"] < 1e-12
        stages = [ours[stage] for stage in ("neighbours", "boruvka", "labels")]
        assert sum(stages) == pytest.approx(ours["seconds"])
    assert set(content["exponents"]) == {"products", "hdbscan"}
    words = (out / "clustering.md").read_text()
    assert words.count("\n| ") == 4
    assert "| – | – |" in words
    assert "320 tokens, products of matrices" in capsys.readouterr().out


def row(system, tokens, seconds):
    return {"system": system, "tokens": tokens, "seconds": seconds, "peak_gb": 1.0}


def test_exponents_are_of_the_larger_sizes_and_systems_that_agree_say_so():
    rows = [row("products", 100, 5.0), row("hdbscan", 100, 2.0)]
    rows += [row("products", n, 1e-6 * n**1.5) for n in (2500, 5000, 20_000)]
    assert clustering.exponents(rows) == {"products": pytest.approx(1.5)}
    small = [row("hdbscan", n, 1e-3 * n**2) for n in (100, 300)]
    assert clustering.exponents(small) == {"hdbscan": pytest.approx(2)}
    result = {"result": (np.arange(1.0, 4.0), np.array([0, 0, -1, 1]))}
    both = [row("products", 4, 1.0) | result, row("hdbscan", 4, 30.0) | result]
    ours, theirs = clustering.compare(both)
    assert (ours["times_faster"], ours["weights_differ"], ours["noise_differs"]) == (30, 0, 0)
    assert (ours["ari"], ours["clusters"], ours["noise"]) == (1, 2, 0.25)
    assert "ari" not in theirs
    assert "result" not in ours


# Extraction


def test_every_recipe_is_timed_by_its_stages(tmp_path, capsys, monkeypatch):
    make, quick = extraction.config_of, {"best": MEANS, "paper": CLUSTERING}
    monkeypatch.setattr(extraction, "load_model", lambda *_args, **_options: toy_vit(depth=2))
    monkeypatch.setattr(
        extraction, "config_of", lambda task: replace(make(task), clustering=quick[task.recipe])
    )
    extraction.main(["--sizes", "24", "16", "--preset", "smoke", "--out", str(tmp_path / "out")])
    out = tmp_path / "out"
    assert contents(out).keys() == {f"extraction.{kind}" for kind in ("json", "md", "png")}
    text = (out / "extraction.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    rows = content["rows"]
    assert [(each["images"], each["recipe"]) for each in rows] == [
        (16, "best"), (16, "paper"), (24, "best"), (24, "paper"),
    ]  # fmt: skip
    for each in rows:
        assert sum(each["stages"].values()) == pytest.approx(each["seconds"], rel=0.05)
        assert each["times"] == pytest.approx(each["seconds"] / each["plain"])
        assert each["disk"] > 0
    known = {"recording", "drawing", "clustering", "statistics", "sizing", "other"}
    assert set(rows[0]["stages"]) == known | {"coherence", "refit"}
    assert set(rows[1]["stages"]) == known
    assert content["facts"]["preset"] == "smoke"
    assert (out / "extraction.md").read_text().count("\n| ") == 5
    assert "times a plain pass" in capsys.readouterr().out
    table = extraction.for_figure(rows[:1])
    assert table["passes"].sum() == pytest.approx(rows[0]["times"], rel=0.05)


# The full ImageNet train set


def test_one_model_is_measured_and_all_are_worked_out(tmp_path):
    names = [SMALL_VIT, "test_vit2"]
    scale.main(["--models", *names, "--images", "8", "--experts", "4", "--out", str(tmp_path)])
    content = json.loads((tmp_path / "scale.json").read_text())
    assert content["facts"]["measured"] == SMALL_VIT
    assert all(seconds > 0 for seconds in content["measured"].values())
    assert list(content["imagenet"]) == list(content["sizes"]) == names
    words = (tmp_path / "scale.md").read_text()
    assert words.count(f"| {SMALL_VIT} |") == 4
    assert "no GPU was measured" in words
    # sizes by hand: 6 layers of width 64, 4 experts and that of CLS
    found, dim, sampled = content["sizes"][SMALL_VIT], 64, 4000
    hidden = found["hidden"]
    assert found["sums"]["statistics"] == 6 * 8 * (5 * (2 + 2 * hidden + dim**2) + 2 * dim**2 + 2)
    assert found["sums"]["refit"] == 6 * 8 * 2 * hidden**2
    assert found["sums"]["drawing"] == 6 * 8 * (sampled * dim + dim + 2 * dim**2 + 2)
    assert found["passes"] == {"drawing": 1, "statistics": 1, "refit": 1}
    assert found["tokens"] == 6 * 101 * (2 * dim + 2 * (2 * dim + 4))


def sizes_of(macs, tokens, dim, passes=(1, 1, 1)):
    return {
        "macs": macs, "tokens": tokens, "dim": dim, "layers": 2,
        "memory": {"sums": 1e9, "weights": 2e9}, "sums": {"a": 4e9, "b": 4e9},
        "passes": dict(zip(("drawing", "statistics", "refit"), passes, strict=True)),
    }  # fmt: skip


def test_hours_follow_from_the_seconds_of_one_image():
    seconds = {"forward": 1.0, "gradients": 3.0, "clustering of a layer": 3600.0}
    seconds |= {f"sums of {name}": 0.5 for name in ("drawing", "statistics", "refit")}
    known = {"small": sizes_of(1e9, 100, 64), "wide": sizes_of(4e9, 200, 128)}
    known["more"] = sizes_of(1e9, 100, 64, passes=(1, 2, 3))
    facts, n = {"measured": "small", "looked_at": 4, "part": 2}, scale.IMAGENET
    one, eight, _ = scale.work_out(facts, seconds, known, "small")
    more, wide = (scale.work_out(facts, seconds, known, name)[0] for name in ("more", "wide"))
    assert one["hours_model"] == pytest.approx((3 * (2 * n + 8) + n) / 3600)
    assert one["hours_sums"] == pytest.approx(1.5 * n / 3600)
    assert (one["seconds_clusters"], one["sent"]) == (7200, 0)
    assert more["hours_model"] == pytest.approx((3 * (3 * n + 8) + 3 * n) / 3600)
    assert eight["hours_model"] == pytest.approx(one["hours_model"] / 8)
    assert eight["seconds_clusters"] == 3600
    assert eight["sent"] == pytest.approx(2 * 7 / 8 * 8e9)
    assert eight["memory"] == one["memory"] == 3e9
    everything = one["hours_model"] + one["hours_sums"]
    assert one["hours_gpu"] == pytest.approx(everything * 1e9 / scale.ASSUMED)
    assert wide["hours_model"] == pytest.approx(4 * one["hours_model"])
    assert wide["hours_sums"] == pytest.approx((2 * 1.0 + 4 * 0.5) * n / 3600)
