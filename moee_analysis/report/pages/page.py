"""The page of one notebook: its story, figures and tables; code and solutions out of sight."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from moee_analysis.outside_text import printable
from moee_analysis.report.pages.accessibility import accessible, told_below
from moee_analysis.report.pages.html import document, link, standing_alone
from moee_analysis.report.pages.output import shorten, shortened
from moee_analysis.report.pages.solutions import folded
from moee_analysis.report.results import FILE, alternative
from moee_analysis.report.runner.worker import NOTEBOOK

PAGE = "page.html"
LOG = "log.txt"
ENDINGS = {
    "cell_error": "A cell failed; what follows it did not run",
    "timeout": "A cell took too long; the notebook was stopped",
    "dead_kernel": "The process that ran this notebook died",
}
SWITCH = '<label class="switch"><input type="checkbox" id="code"> Show code</label>'
LOG_LINES = 40
LIVE_ONLY = {"application/vnd.jupyter.widget-view+json", "application/javascript"}


def write_page(folder: Path, status: Mapping[str, Any]) -> None:
    """Write ``page.html`` of a notebook run into its ``folder``.

    After a timeout or a dead kernel there is no notebook to show: the page tells what
    happened, and shows the figures that were kept before.
    """
    executed = folder / NOTEBOOK
    complete = executed.is_file()
    figures = _figures(folder)
    if complete:
        findings = {alternative(figure): figure.get("finding") for figure in figures}
        told = {alt: finding for alt, finding in findings.items() if finding}
        inside = accessible(_notebook_body(executed), told)
    else:
        inside = _remains(folder, status, figures)
    body = f"""<header class="bar">
<nav><a href="../index.html">← All notebooks</a></nav>{SWITCH if complete else ""}
</header>
<main class="page">
{_banner(status)}{inside}
{_files(folder, status)}
</main>"""
    (folder / PAGE).write_text(document(status["title"], body), encoding="utf-8")


def read_story(notebook: Path) -> dict[str, str]:
    """``title`` and ``summary`` of a notebook: its first heading and the paragraph after it."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    texts = ("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    blocks = [block.strip() for block in next(texts, "").split("\n\n")]
    heading = next((b for b in blocks if b.startswith("# ")), "")
    title, _, rest = heading.removeprefix("# ").partition("\n")
    prose = [rest, *blocks] if rest else blocks
    summary = next((b for b in prose if b and not b.startswith(("#", "|", "<", "!"))), "")
    told = {"title": title or notebook.stem.replace("_", " "), "summary": _unmarked(summary)}
    return {name: printable(text) for name, text in told.items()}


def data_uri(picture: bytes, kind: str = "png") -> str:
    """``picture`` as an address that carries it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def _notebook_body(path: Path) -> str:
    import nbformat
    from nbconvert import HTMLExporter
    from traitlets.config import Config

    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _shows_something(output)]
            for output in cell.outputs:
                shorten(output)
    config = Config()
    config.TagRemovePreprocessor.enabled = True
    config.TagRemovePreprocessor.remove_cell_tags = ("papermill-error-cell-tag", "remove-cell")
    config.TagRemovePreprocessor.remove_input_tags = ("remove-input",)
    config.TagRemovePreprocessor.remove_all_outputs_tags = ("remove-output",)
    exporter = HTMLExporter(config=config, template_name="basic", exclude_anchor_links=True)
    body, _ = exporter.from_notebook_node(notebook)
    return folded(standing_alone(body))


def _shows_something(output: Any) -> bool:
    """Strip what only a live notebook can show; whether anything is left."""
    data = output.get("data")
    if data is None:
        return True
    live = data.keys() & LIVE_ONLY
    for kind in live:
        del data[kind]
    if live:
        data.pop("text/plain", None)  # the widget's repr
    return bool(data)


def _banner(status: Mapping[str, Any]) -> str:
    if status["status"] == "ok":
        return ""
    cell = f"Cell [{status['cell']}]: " if status.get("cell") else ""
    return (
        f'<div class="banner" role="alert"><p><b>{ENDINGS[status["status"]]}</b></p>'
        f"<p>{cell}{escape(status['error'])}</p></div>\n"
    )


def _figures(folder: Path) -> list[dict[str, Any]]:
    """The figures that a run kept, as its results tell of them."""
    found = folder / FILE
    results = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    return list(results.get("figures", {}).values())


def _remains(folder: Path, status: Mapping[str, Any], figures: list[dict[str, Any]]) -> str:
    """What a run left that has no notebook: its figures, and the end of its log."""
    parts = [f"<h1>{escape(status['title'])}</h1>", f"<p>{escape(status['summary'])}</p>"]
    if figures:
        parts.append("<h2>Kept before it stopped</h2>")
    parts += [_kept(folder, figure) for figure in figures]
    log = folder / LOG
    if log.is_file():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = escape(shortened("\n".join(map(printable, lines[-LOG_LINES:]))))
        parts.append(f'<h2>The end of its log</h2><pre class="log">{tail}</pre>')
    return "\n".join(parts)


def _kept(folder: Path, figure: Mapping[str, Any]) -> str:
    """A figure with its alternative text, and its finding below."""
    picture = data_uri((folder / figure["file"]).read_bytes())
    image = f'<img src="{picture}" alt="{escape(alternative(figure))}">'
    below = told_below(figure["finding"]) if figure.get("finding") else ""
    return f'<div class="kept">{image}{below}</div>'


def _files(folder: Path, status: Mapping[str, Any]) -> str:
    """Links to the files beside the page."""
    names = [name for name in (FILE, NOTEBOOK) if (folder / name).is_file()]
    names += sorted(p.relative_to(folder).as_posix() for p in folder.glob("tables/*.csv"))
    links = " · ".join(link(name, name) for name in names)
    beside = f"<p>The numbers: {links}</p>" if names else ""
    return f'<footer class="fine"><p>Ran for {status["seconds"]:.0f} s.</p>{beside}</footer>'


def _unmarked(text: str) -> str:
    """One line of Markdown as plain text: no emphasis, links by their words."""
    import re

    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    return " ".join(re.sub(r"[*`_]{1,2}(\S(?:.*?\S)?)[*`_]{1,2}", r"\1", words).split())
