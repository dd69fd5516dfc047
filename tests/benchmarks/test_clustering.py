from __future__ import annotations

import importlib
import json
import os

import numpy as np
import pytest

from tests.helpers.processes import benchmark

FILES = {"clustering.json", "clustering.md", "clustering.png"}


@pytest.fixture(scope="module")
def clustering():
    with benchmark("clustering") as script:
        yield script


@pytest.fixture(scope="module")
def tables(clustering):
    return importlib.import_module("clustering_tables")


@pytest.fixture
def here(clustering, monkeypatch):
    """Processes cost more than what is measured in them here."""
    monkeypatch.setattr(clustering, "apart", lambda function, *args: function(*args))
    return clustering


def row(system, tokens, seconds):
    return {"system": system, "tokens": tokens, "seconds": seconds, "peak_gb": 1.0}


def test_the_command_measures_both_systems_on_the_bundled_model(here, tmp_path, capsys):
    here.main(
        ["--limit", "8", "--sizes", "120", "200", "320", "--hdbscan-limit", "200",
         "--out", str(tmp_path / "out")]
    )  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    text = (tmp_path / "out" / "clustering.json").read_text()
    assert str(tmp_path) not in text
    content = json.loads(text)
    assert content["facts"]["layer"] == "blocks.6.mlp"
    assert (content["facts"]["dim"], content["facts"]["tokens"]) == (256, 8 * 65)
    rows = content["rows"]
    assert [(r["tokens"], r["system"]) for r in rows] == [
        (120, "products"), (120, "hdbscan"), (200, "products"), (200, "hdbscan"),
        (320, "products"),
    ]  # fmt: skip
    for ours in (rows[0], rows[2]):
        assert ours["weights_differ"] < 1e-12
        assert ours["neighbours"] + ours["boruvka"] + ours["labels"] == pytest.approx(
            ours["seconds"]
        )
    assert set(content["exponents"]) == {"products", "hdbscan"}
    words = (tmp_path / "out" / "clustering.md").read_text()
    assert words.count("\n| ") == 4
    assert "| – | – |" in words
    assert "320 tokens, products of matrices" in capsys.readouterr().out


def test_a_measurement_has_a_process_of_its_own(clustering):
    assert clustering.apart(os.getpid) != os.getpid()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [(["--layer", "40"], "a layer of the model"), (["--sizes", "900"], "520 in 8 images")],
)
def test_bad_input_is_told_in_one_line(here, tmp_path, capsys, wrong, words):
    with pytest.raises(SystemExit) as stopped:
        here.main(["--limit", "8", "--out", str(tmp_path / "out"), *wrong])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_exponents_are_of_the_larger_sizes(tables):
    rows = [row("products", 100, 5.0), row("hdbscan", 100, 2.0)]
    rows += [row("products", n, 1e-6 * n**1.5) for n in (2500, 5000, 20_000)]
    assert tables.exponents(rows) == {"products": pytest.approx(1.5)}
    small = [row("hdbscan", n, 1e-3 * n**2) for n in (100, 300)]
    assert tables.exponents(small) == {"hdbscan": pytest.approx(2)}


def test_systems_that_agree_say_so(clustering):
    weights, labels = np.arange(1.0, 4.0), np.array([0, 0, -1, 1])
    rows = [row("products", 4, 1.0), row("hdbscan", 4, 30.0)]
    for found in rows:
        found["result"] = (weights, labels)
    ours, theirs = clustering.compared(rows)
    assert (ours["times_faster"], ours["weights_differ"], ours["noise_differs"]) == (30, 0, 0)
    assert (ours["ari"], ours["clusters"], ours["noise"]) == (1, 2, 0.25)
    assert "ari" not in theirs
    assert "result" not in ours
