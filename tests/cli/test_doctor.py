"""``moee doctor``: what it finds is so, and what is broken is named with what to do."""

from __future__ import annotations

import json
import os

import psutil
import pytest

from moee_analysis import cli
from moee_analysis.cli import doctor
from moee_analysis.cli.costs import RECIPES, Speed, costs_of
from moee_analysis.cli.doctor_text import diagnosis_json, diagnosis_text, duration
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import load_model

SPEED = Speed(scene=0.005, image=0.02, scatter=0.002)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory):
    """A real look at this machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEE_STORE", str(tmp_path_factory.mktemp("store")))
        return doctor.examined(preset="smoke")


def check_named(diagnosis, name):
    return next(check for check in diagnosis.checks if check.name == name)


def test_this_machine_is_well(healthy):
    assert healthy.ok
    assert "All required parts work" in diagnosis_text(healthy)
    assert healthy.versions["torch"] in diagnosis_text(healthy)
    assert all(check.ok or check.advice for check in healthy.checks)


def test_the_machine_is_the_one_it_runs_on(healthy):
    machine = healthy.machine
    assert machine["cores"] == len(os.sched_getaffinity(0))
    assert machine["memory_free"] < machine["memory"] <= psutil.virtual_memory().total
    assert str(machine["cores"]) in check_named(healthy, "cores").found


def test_the_bundled_model_really_predicts(healthy, monkeypatch):
    assert "scenes it has never seen" in check_named(healthy, "bundled model").found
    wrong = load_model()
    wrong.head.weight.data.neg_()
    monkeypatch.setattr(doctor, "load_model", lambda *_, **__: wrong)
    broken = list(doctor._bundled())[-1]
    assert not broken.ok
    assert broken.required
    assert "install" in broken.advice


def test_costs_are_told_for_every_recipe(healthy):
    assert [cost.run for cost in healthy.costs.runs][:2] == [
        f"extract --recipe {recipe}" for recipe in RECIPES
    ]
    assert healthy.costs.images == 160
    for cost in healthy.costs.runs:
        assert cost.seconds > 0
        assert cost.memory > psutil.Process().memory_info().rss / 2
        assert cost.disk > 0


def test_more_images_cost_more_until_the_preset_has_enough():
    model = load_model()
    few, many, too_many = (
        costs_of(model, SPEED, images=count, preset="small").runs for count in (100, 1000, 5000)
    )
    for less, more, same in zip(few, many, too_many, strict=True):
        assert less.seconds < more.seconds == same.seconds
        assert less.disk < more.disk == same.disk


def test_all_images_count_with_the_full_preset():
    found = costs_of(load_model(), SPEED, images=5000, preset="full")
    assert found.images == 5000
    assert "report" not in [cost.run for cost in found.runs]  # nobody has measured it


def test_a_report_on_another_model_is_not_guessed(small_run):
    runs = costs_of(small_run.original, SPEED, images=100, preset="small").runs
    assert [cost.run for cost in runs] == [f"extract --recipe {recipe}" for recipe in RECIPES]


def test_a_machine_twice_as_slow_takes_about_twice_as_long():
    model = load_model()
    slow = Speed(*(2 * seconds for seconds in vars(SPEED).values()))
    for one, two in zip(
        costs_of(model, SPEED, images=None, preset="small").runs,
        costs_of(model, slow, images=None, preset="small").runs,
        strict=True,
    ):
        assert 1.7 < two.seconds / one.seconds <= 2
        assert two.disk == one.disk


def test_the_disk_that_is_told_is_what_the_recording_takes(tmp_path):
    from moee_analysis.data.images import load_images
    from moee_analysis.extraction.config.extract_config import ExtractConfig
    from moee_analysis.extraction.record.calibration_set import calibration_of

    model, config = load_model(), ExtractConfig(recipe="best", preset="smoke")
    images = load_images(split="calibration", limit=20)
    calibration = calibration_of(model, images, config.resolved(), root=tmp_path)
    for _ in calibration.parts(calibration.sites):
        pass
    taken = sum(path.stat().st_size for path in tmp_path.rglob("*.npy"))
    told = costs_of(model, SPEED, images=20, preset="smoke").runs[1].disk
    assert told == pytest.approx(taken, rel=0.05)


@pytest.mark.parametrize(
    ("given", "line"), [({"images": 0}, "images"), ({"preset": "huge"}, "preset")]
)
def test_costs_of_nothing_are_refused(given, line):
    with pytest.raises(MoeeError, match=line):
        costs_of(load_model(), SPEED, **{"images": None, "preset": "small"} | given)


def test_a_library_that_is_missing_or_too_old_is_named(monkeypatch):
    monkeypatch.setattr(
        doctor.metadata,
        "requires",
        lambda _: ["torch>=99", "numpy>=1", "moonbeam", "x; extra=='d'"],
    )
    [_, libraries] = doctor._software()
    assert not libraries.ok
    assert "torch" in libraries.found
    assert ">=99" in libraries.found
    assert "moonbeam is missing" in libraries.found
    assert "numpy" not in libraries.found


def test_a_store_that_cannot_be_written_to_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MOEE_STORE", str(tmp_path / "not" / "there"))
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    store, _ = doctor._store()
    assert not store.ok
    assert "MOEE_STORE" in store.advice
    assert not list(tmp_path.iterdir())


def test_the_store_is_weighed(monkeypatch, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tokens.npy").write_bytes(bytes(25_000_000))
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    store, disk = doctor._store()
    assert store.found == f"{tmp_path}: 0.03 GB"
    assert disk.found.endswith("GB free there")


@pytest.fixture
def broken(healthy, monkeypatch):
    """A machine on which one required part does not work, and an optional one is missing."""
    checks = (
        doctor.Check("heart", "silent", ok=False, advice="plug it in"),
        doctor.Check("hat", "none", ok=False, required=False, advice="it is warm anyway"),
    )
    diagnosis = doctor.Diagnosis(healthy.versions, healthy.machine, checks, None)
    monkeypatch.setattr(doctor, "examined", lambda *_, **__: diagnosis)
    return diagnosis


def test_what_is_broken_ends_with_1_and_says_what_to_do(broken, capsys):
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "✗ heart" in out
    assert "plug it in" in out
    assert "· hat" in out
    assert out.rstrip().endswith("Does not work: heart. What to do stands below each.")


def test_machines_get_json(broken, healthy, capsys):
    assert cli.main(["doctor", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"]
    assert found["checks"][0]["advice"] == "plug it in"
    assert found["costs"] is None
    whole = json.loads(diagnosis_json(healthy))
    assert whole["costs"]["runs"][0]["seconds"] == healthy.costs.runs[0].seconds


def test_a_model_that_is_not_there_is_told_in_one_line(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    assert cli.main(["doctor", "--model", "bundeld"]) == 2
    assert "bundeld" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("seconds", "said"), [(4.4, "4 s"), (89, "89 s"), (100, "2 min"), (5399, "90 min"),
                          (9000, "2.5 h")],
)  # fmt: skip
def test_durations_are_said_as_a_person_says_them(seconds, said):
    assert duration(seconds) == said
