"""A report that runs says how far it is."""

from __future__ import annotations

import io
import sys

import pytest

from moee_analysis.report.runner import run_notebooks as reports
from moee_analysis.report.runner.cell_progress import cell_bar, cells_noted, code_cells, note_cell
from tests.helpers.notebooks import write_notebook


@pytest.fixture
def notebooks(tmp_path):
    """Two notebooks of one and of two code cells, beside their parameters."""
    return [
        write_notebook(tmp_path / "one.ipynb", "md:# Words", "print(1)"),
        write_notebook(tmp_path / "two.ipynb", "print(1)", "", "print(2)"),
    ]


def on_a_screen(monkeypatch):
    written = io.StringIO()
    written.isatty = lambda: True
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    monkeypatch.setattr(sys, "stderr", written)
    return written


def test_all_cells_that_run_are_counted_and_those_alone(notebooks):
    """The parameters cell, and the one that papermill adds, beside those of the notebook."""
    assert [code_cells(notebook) for notebook in notebooks] == [3, 4]


def test_notes_of_cells_add_up(tmp_path):
    assert cells_noted(tmp_path) == 0
    note_cell(tmp_path)
    note_cell(tmp_path)
    assert cells_noted(tmp_path) == 2


def test_a_terminal_sees_the_notebook_its_cell_and_the_share_of_all(notebooks, monkeypatch):
    screen = on_a_screen(monkeypatch)
    with cell_bar(notebooks) as bar:
        bar.show(0, 0)
        assert "notebook 1 of 2, cell 1 of 3   0%" in screen.getvalue()
        bar.show(1, 2)
        assert "notebook 2 of 2, cell 3 of 4  71%" in screen.getvalue()
        bar.show(1, 4)
        assert "notebook 2 of 2, cell 4 of 4 100%" in screen.getvalue()


def test_a_log_sees_no_bar(notebooks, capsys, monkeypatch):
    monkeypatch.delenv("MOEE_HEADLESS", raising=False)
    with cell_bar(notebooks) as bar:
        bar.show(1, 2)
    assert capsys.readouterr().err == ""


def test_a_real_report_moves_the_bar_between_its_lines_and_leaves_no_notes(
    notebooks, tmp_path, monkeypatch, capsys
):
    screen, noted, tidy = on_a_screen(monkeypatch), [], reports._tidy

    def after_a_look(folder, names):
        noted.append(cells_noted(folder))
        tidy(folder, names)

    monkeypatch.setattr(reports, "_tidy", after_a_look)
    [outcome] = reports.report(out=tmp_path / "out", notebooks=notebooks[1:], preset="smoke")
    assert outcome.ok
    assert noted == [code_cells(notebooks[1])]
    assert "notebook 1 of 1, cell 1 of 4   0%" in screen.getvalue()
    assert screen.getvalue().endswith("\r")  # the bar is gone
    assert capsys.readouterr().out.startswith("[1/1] two: started\n[1/1] two: ok after")
    assert not [path for path in outcome.folder.iterdir() if path.name.startswith(".")]
