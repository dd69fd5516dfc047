"""A notebook as HTML that stands alone: nothing runs or is fetched, and everybody can read it."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from bs4 import BeautifulSoup
from bs4.element import Tag
from nbconvert import HTMLExporter
from traitlets.config import Config

from moee_analysis.report.pages.output import shorten

SOLUTION = "solution"  # tag of the cells that solve an exercise, and class of their fold
EXPECTED = re.compile(r"!\[[^\]]*\]\(attachment:.*?(\n\n|\Z)", re.DOTALL)
"""The picture that a notebook makes one expect, and what is said of it."""

LIVE_ONLY = {"application/vnd.jupyter.widget-view+json", "application/javascript"}
ACTIVE = ("script", "iframe", "object", "embed", "link", "base", "meta", "audio", "video")
LOADING = ("src", "srcset", "poster", "background", "data", "xlink:href")


def notebook_body(path: Path, findings: Mapping[str, str]) -> str:
    """The executed notebook at ``path`` as HTML; ``findings`` are by figures' alternative texts."""
    notebook = nbformat.read(path, as_version=4)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if _shows_something(output)]
            for output in cell.outputs:
                shorten(output)
        elif cell.pop("attachments", None):  # the page has the one that came
            cell.source = EXPECTED.sub("", cell.source)
    removed = {"enabled": True, "remove_cell_tags": ("papermill-error-cell-tag",)}
    config = Config({"TagRemovePreprocessor": removed})
    exporter = HTMLExporter(config=config, template_name="basic", exclude_anchor_links=True)
    return refine(exporter.from_notebook_node(notebook)[0], findings)


def refine(html: str, findings: Mapping[str, str]) -> str:
    """``html`` without anything active, with folded solutions, and for keys and screen readers."""
    soup = BeautifulSoup(html, "html.parser")
    for tag in soup([*ACTIVE, "style"]):
        if tag.name != "style" or _fetches(tag.get_text()):
            tag.decompose()
    for tag in soup.find_all():
        _quieten(tag, soup)
    for cell in soup.find_all(class_=f"celltag_{SOLUTION}"):
        _fold(cell, soup)
    for table in soup.find_all("table"):
        _name_headers(table)
        # a frame that the arrow keys scroll where the table is wider than the page
        frame = {"class": "wide", "tabindex": "0", "role": "group", "aria-label": "Table"}
        table.wrap(soup.new_tag("div", attrs=frame))
    for image in soup.find_all("img"):
        if image.get("alt") in findings:  # for all who see; screen readers have heard it before
            below = {"class": "finding", "aria-hidden": "true"}
            image.insert_after(soup.new_tag("p", attrs=below, string=findings[image["alt"]]))
    return str(soup)


def _shows_something(output: Any) -> bool:
    """Strip what only a live notebook can show; whether anything is left."""
    data = output.get("data")
    if data is None:
        return True
    if data.keys() & LIVE_ONLY:
        for kind in (*LIVE_ONLY, "text/plain"):  # that is the widget's repr
            data.pop(kind, None)
    return bool(data)


def _quieten(tag: Tag, soup: BeautifulSoup) -> None:
    """Take from one tag what fetches or runs; a picture on the network becomes a link to it."""
    source = str(tag.get("src", ""))
    if tag.name == "img" and not source.startswith("data:"):
        tag.replace_with(soup.new_tag("a", href=source, string=str(tag.get("alt") or source)))
        return
    for name, value in [(name, str(value)) for name, value in tag.attrs.items()]:
        loads = name in LOADING and not value.startswith(("data:", "#"))
        draws = tag.name in ("image", "use") and name == "href" and not value.startswith("#")
        if loads or draws or name.startswith("on") or (name == "style" and _fetches(value)):
            del tag[name]


def _fetches(css: str) -> bool:
    return "@import" in css or "url(" in css


def _fold(cell: Tag, soup: BeautifulSoup) -> None:
    """Put a solution's ``cell`` into a fold, which cells that follow each other share."""
    fold = cell.find_previous_sibling()
    if fold is None or fold.name != "details":
        fold = soup.new_tag("details", attrs={"class": SOLUTION})
        fold.append(soup.new_tag("summary", string="Solution"))
        cell.insert_before(fold)
    if cell.find(class_="output_error"):
        fold["open"] = ""
    fold.append(cell)


def _name_headers(table: Tag) -> None:
    """Say which cells a header is the header of; a header without words is none."""
    head = table.find("thead")
    if head is not None and not head.get_text(strip=True):
        head.decompose()
    for header in table.find_all("th"):
        if header.get_text(strip=True):
            header["scope"] = "col" if header.find_parent("thead") else "row"
        else:
            header.name = "td"
