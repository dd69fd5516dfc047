"""Names of folders, files and classes that could be taken for something else than text."""

import json
from urllib.parse import unquote

import pytest
from bs4 import BeautifulSoup
from nbconvert.filters import markdown2html

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.class_names import class_names, name_by_folders, read_class_names
from moee_analysis.outside_text import as_markdown, printable
from moee_analysis.report.atlas import write_atlas
from moee_analysis.report.runner.run_notebooks import report
from moee_analysis.utils.progress import tell
from tests.helpers.images import image_folder
from tests.helpers.models import lively
from tests.helpers.notebooks import write_notebook
from tests.helpers.runs import quick

SHOWN = {
    "{{facts}}": "{{facts}}",
    "**a** _b_ `c` ~~d~~": "**a** _b_ `c` ~~d~~",
    "[x](mailto:y@example.org) ![z]()": "[x](mailto:y@example.org) ![z]()",
    "a | b <b>c<i>": "a | b <b>c<i>",
    "$\\frac$ and \\(x\\)": "$\\frac$ and \\(x\\)",
    "1. www.example.org &amp;": "1. www.example.org &amp;",
    "\x1b[31mred\x07": "\\x1b[31mred\\x07",
    "two\nlines\r": "two\\nlines\\r",
    "\u202egnp.exe\u2066\u200f\u2028": "\\u202egnp.exe\\u2066\\u200f\\u2028",
    "caf\udce9": "caf\\xe9",
    "Straße 猫 لعبة": "Straße 猫 لعبة",
}
"""What is read of the names of folders."""

PARAMETERS = 'images: str = "bundled"\npreset: str = "small"\nout: str = None'
CELLS = [
    """from moee_analysis.report.notebook.bench import open_notebook
import pandas as pd
bench = open_notebook("x", images=images, preset=preset, out=out)
bench""",
    "names = bench.images.classes\nbench.claim(', '.join(names), ', '.join(names), True)",
    "display(*(bench.headline(name, name, dense=name) for name in names))",
    "display(*map(bench.answer, names))",
    "pd.DataFrame({name: [name] for name in names}).T",
    """from moee_analysis.plots import style
fig, ax = style.figure(6, 2)
ax.set_xticks(range(len(names)), names)
ax.set_title(names[0])
bench.figure("f", style.caption(fig, ", ".join(names)), finding=", ".join(names))""",
    "bench.finish()",
]


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path / "<i>{{about}}\u202e*x*", dict.fromkeys(SHOWN, 4))


def words(markdown: str) -> BeautifulSoup:
    return BeautifulSoup(markdown2html(markdown), "html.parser")


def refuses_forms(page: BeautifulSoup) -> bool:
    policy = page.find("meta", {"http-equiv": "Content-Security-Policy"})["content"].split("; ")
    return {"default-src 'none'", "base-uri 'none'", "form-action 'none'"} <= set(policy)


@pytest.mark.parametrize("name", [*SHOWN, "http://example.org/a", "    code", "# x", "- x", "2) x"])
def test_markdown_shows_a_name_literally(name):
    name = name.replace("\udce9", "e")
    soup = words(as_markdown(name))
    assert {tag.name for tag in soup.find_all()} <= {"p", "span"}
    assert soup.get_text() == f"{printable(name)}\n"
    row = words(f"| | |\n|:--|:--|\n| x | {as_markdown(name)} |").find_all("td")
    assert [cell.get_text().strip() for cell in row] == ["x", printable(name).strip()]


def test_no_formula_can_begin_and_end_in_one_element():
    for element in words(as_markdown("$x$ $$y$$ \\(z\\)")).find_all("span"):
        assert len(element.get_text()) == 1


def test_what_is_told_in_a_terminal_keeps_to_one_line_and_one_colour(capsys):
    tell("images of \x1b[31m\n\u202e")
    assert capsys.readouterr().out == "images of \\x1b[31m\\n\\u202e\n"
    assert str(MoeeError("a folder", "'\x1b]0;x\x07\n'", "x")) == (
        "expected a folder; found '\\x1b]0;x\\x07\\n'. What to do: x."
    )


def test_class_folders_are_the_classes_of_a_file_of_the_same_names(tmp_path):
    images = load_images(image_folder(tmp_path, {"\u202ea": 1, "b\x1b[0m": 1}))
    (tmp_path / "names.txt").write_text("b\x1b[0m\n\u202ea\n", encoding="utf-8")
    model = lively(num_classes=2)
    model.pretrained_cfg["label_names"] = read_class_names(tmp_path / "names.txt")
    assert class_names(model) == ("b\\x1b[0m", "\\u202ea")
    assert dict(zip(images.folders, images.labels(model), strict=True)) == {
        "b\\x1b[0m": 0, "\\u202ea": 1,
    }  # fmt: skip


def test_the_atlas_shows_names_as_text(folder, tmp_path):
    images = load_images(folder)
    model = lively(num_classes=len(SHOWN))
    name_by_folders(model, images.classes)
    page = write_atlas(extract(model, images, quick()), images, tmp_path / "a.html", dense=model)
    soup = BeautifulSoup(page.read_text(encoding="utf-8"), "html.parser")
    told = {dt.get_text(): dt.find_next("dd").get_text() for dt in soup.find_all("dt")}
    assert told["Images"] == f"{len(images)} of <i>{{{{about}}}}\\u202e*x*"
    facts = json.loads(soup.find(id="facts").string)
    labels = {name.replace("_", " ") for name in SHOWN.values()}
    assert {image["class"] for image in facts["images"]} == labels
    assert {image["dense"] for image in facts["images"]} <= labels
    assert not soup.find_all(["i", "b", "a"])
    assert len(soup.find_all("script")) == 2
    assert refuses_forms(soup)


def test_a_report_shows_names_as_text(folder, tmp_path):
    notebook = write_notebook(
        tmp_path / "a#1?%20 <b>{{x}}\u202e.ipynb", *CELLS, parameters=PARAMETERS
    )
    out = tmp_path / "out"
    (done,) = report({"images": str(folder)}, out=out, preset="smoke", notebooks=[notebook])
    assert done.ok, done.error
    soup = BeautifulSoup((done.folder / "page.html").read_text(encoding="utf-8"), "html.parser")
    outputs = [each.get_text() for each in soup.find_all(class_="output_area")]
    for shown in SHOWN.values():
        assert sum(shown in output for output in outputs) >= 4
        assert shown in {cell.get_text() for cell in soup.find_all("td")}
        assert shown in soup.find("img")["alt"]
    assert "<i>{{about}}\\u202e*x*" in soup.find("td", string="images").find_next("td").get_text()
    assert not soup.find_all(["i", "code", "del"])
    assert all(":" not in link["href"] for link in soup.find_all("a"))
    index = BeautifulSoup((out / "index.html").read_text(encoding="utf-8"), "html.parser")
    link = index.find("h2").a
    assert link.get_text() == "The a#1?%20 <b>{{x}}\\u202e notebook"
    assert out / unquote(link["href"]) == done.folder / "page.html"
    for page in (soup, index):
        assert refuses_forms(page)
