"""The page of one notebook: its story, figures and tables; code and solutions out of sight."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moee_analysis.outside_text import printable
from moee_analysis.report.notebook.results import FILE, NOTEBOOK, alternative
from moee_analysis.report.pages.body import notebook_body
from moee_analysis.report.pages.output import shortened
from moee_analysis.report.pages.templates import data_uri, render

PAGE = "page.html"
LOG = "log.txt"
LOG_LINES = 40


def write_page(folder: Path, status: Mapping[str, Any]) -> None:
    """Write ``page.html`` of a notebook run into its ``folder``.

    After a timeout or a dead kernel there is no notebook to show: the page tells what
    happened, and shows the figures that were kept before.
    """
    results = folder / FILE
    found = json.loads(results.read_text(encoding="utf-8")) if results.is_file() else {}
    figures = list(found.get("figures", {}).values())
    facts: dict[str, Any] = {"files": _files(folder)}
    if (folder / NOTEBOOK).is_file():
        findings = {alternative(f): f["finding"] for f in figures if f.get("finding")}
        facts["notebook"] = notebook_body(folder / NOTEBOOK, findings)
    else:
        facts |= {"figures": [_carried(folder, f) for f in figures], "log": _end_of_log(folder)}
    (folder / PAGE).write_text(render("pages/page.html", **status, **facts), encoding="utf-8")


def read_story(notebook: Path) -> dict[str, str]:
    """``title`` and ``summary`` of a notebook: its first heading and the paragraph after it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    blocks = [block.strip() for block in next(texts, "").split("\n\n")]
    heading = next((b for b in blocks if b.startswith("# ")), "")
    title, _, rest = heading.removeprefix("# ").partition("\n")
    prose = [rest, *blocks] if rest else blocks
    summary = next((b for b in prose if b and not b.startswith(("#", "|", "<", "!"))), "")
    story = {"title": title or notebook.stem.replace("_", " "), "summary": _without_marks(summary)}
    return {name: printable(text) for name, text in story.items()}


def _carried(folder: Path, figure: Mapping[str, Any]) -> dict[str, Any]:
    picture = data_uri((folder / figure["file"]).read_bytes())
    return {"picture": picture, "alt": alternative(figure), "finding": figure.get("finding")}


def _end_of_log(folder: Path) -> str:
    if not (folder / LOG).is_file():
        return ""
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return shortened("\n".join(map(printable, lines[-LOG_LINES:])))


def _files(folder: Path) -> list[str]:
    """The files beside the page."""
    tables = sorted(p.relative_to(folder).as_posix() for p in folder.glob("tables/*.csv"))
    return [*(name for name in (FILE, NOTEBOOK) if (folder / name).is_file()), *tables]


def _without_marks(text: str) -> str:
    """One line of Markdown as plain text: no emphasis, links by their words."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`_]{1,2}(\S(?:.*?\S)?)[*`_]{1,2}", r"\1", words).split())
