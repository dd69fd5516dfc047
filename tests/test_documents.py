"""What people read: short sentences, numbers that agree everywhere, links that lead somewhere."""

import json
import re
from functools import cache
from pathlib import Path

import pytest
import results

from moee_analysis.errors import MoeeError
from tests.conftest import ROOT
from tests.helpers.printed import assert_alike

PAGES = results.documents()
README = ROOT / "README.md"
FACTS = json.loads(results.MEASURED.read_text(encoding="utf-8"))["facts"]
CODE = re.compile(r"^```.*?^```$", re.M | re.S)
NUMBER = r"\d(?:[\d.,]*\d)?"
SENTENCE_END = re.compile(r"(?<=[.!?])[*_\")]*\s+(?=\S)")


def sentences(text: str) -> list[str]:
    """Those of the paragraphs and list items; code, tables, headings and addresses apart."""
    text = re.sub(r"<[^>]+>", "", CODE.sub("", text))
    text = re.sub(r"`[^`]*`", "code", re.sub(r"!?\[([^\]]*)\]\([^)\s]*\)", r"\1", text))
    text = re.sub(r"^ *(?:[|#].*| {4}.*)$", "\n", text, flags=re.M)
    paragraphs = re.split(r"\n\s*\n|\n *(?:[-*]|\d\.) ", text)
    return [each for p in paragraphs for each in SENTENCE_END.split(" ".join(p.split())) if each]


def words(text: str) -> list[str]:
    return re.findall(r"\S*\w\S*", text)


def links(page: Path) -> list[str]:
    """Those inside the house."""
    return re.findall(r"\]\(((?!\w+:)[^)\s]+)\)", CODE.sub("", page.read_text(encoding="utf-8")))


@cache
def anchors(target: Path) -> set[str]:
    """Headings of a page, cells of a notebook."""
    text = target.read_text(encoding="utf-8")
    if target.suffix == ".ipynb":
        return {f"cell-id={cell['id']}" for cell in json.loads(text)["cells"]}
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def pattern(said: str, number: str | None = None) -> str:
    """Of what a fact says, each ``{number}`` in it as it is or, where given, any ``number``."""
    parts = re.split(r"\{(.*?)\}", " ".join(said.split()))
    return "".join(
        number or re.escape(part) if index % 2 else re.escape(part)
        for index, part in enumerate(parts)
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_sentences_are_short_and_brackets_hold_no_brackets(page):
    said = sentences(page.read_text(encoding="utf-8"))
    assert not [each for each in said if len(words(each)) > 30]
    assert not [each for each in said if re.search(r"\([^()]*\(", each)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_link_leads_to_a_file_and_a_place_in_it(page):
    for link in links(page):
        place, _, fragment = link.partition("#")
        target = (page.parent / place).resolve() if place else page
        assert target.is_file(), link
        assert not fragment or fragment in anchors(target), link


def test_the_readme_is_read_to_its_end():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert sum(len(words(each)) for each in sentences(text)) <= 600


def test_the_five_lines_of_the_readme_print_what_it_says(capsys):
    code, quoted = re.search(
        r"```python\n(.*?)```.*?```text\n(.*?)```", README.read_text(), re.S
    ).groups()
    exec(code, {})
    assert_alike(capsys.readouterr().out, quoted)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_tables_are_those_of_the_measured_results(page):
    text = page.read_text(encoding="utf-8")
    assert results.filled(text) == text, "python benchmarks/results.py writes them"


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["about"])
def test_every_document_states_a_number_as_it_was_measured(fact):
    assert fact.keys() == {"about", "date", "machine", "command", "seed", "says"}
    texts = {
        page.name: " ".join(page.read_text(encoding="utf-8").replace("**", "").split())
        for page in PAGES
    }
    for said in fact["says"]:
        told = {
            (name, found)
            for name, text in texts.items()
            for found in re.findall(pattern(said, NUMBER), text)
        }
        assert told, f"no document says: {said}"
        assert not {(n, f) for n, f in told if not re.fullmatch(pattern(said), f)}, said


@pytest.fixture
def page(tmp_path, monkeypatch):
    """A document with the key numbers of the notebooks, and measured results, to be changed."""
    copy, page = tmp_path / "results.json", tmp_path / "page.md"
    copy.write_text(results.MEASURED.read_text(encoding="utf-8"), encoding="utf-8")
    page.write_text("before\n<!-- results:headlines -->\n<!-- /results -->\nafter\n")
    monkeypatch.setattr(results, "MEASURED", copy)
    monkeypatch.setattr(results, "documents", lambda: [page])
    return page


def _report(folder: Path, preset: str) -> None:
    found = {
        "parameters": {"preset": preset, "seed": 3},
        "headline": {"label": "kept", "value": "77.7%", "dense": "90%"},
        "claims": [
            {"statement": "It works.", "holds": False, "ours": False, "found": "", "verdict": ""},
            {"statement": "It is ours.", "holds": True, "ours": True, "found": "", "verdict": ""},
        ],
        "environment": {"finished": "2030-01-02T03:04:05+00:00", "seconds": 12.3},
    }
    (folder / "01_extraction").mkdir(parents=True)
    (folder / "01_extraction" / "results.json").write_text(json.dumps(found))


def test_a_report_brings_its_key_numbers_to_the_documents(tmp_path, page):
    before = results.measured("notebooks")
    _report(tmp_path / "reports", "small")
    results.main(["--report", str(tmp_path / "reports"), "--machine", "two slow cores"])
    text = page.read_text()
    assert "**77.7%** kept | 90% |" in text
    assert "2030-01-02, two slow cores, preset `small`, seed 3" in text
    assert text.startswith("before\n<!--")
    assert text.endswith("-->\nafter\n")
    after = results.measured("notebooks")
    taken = after.pop("01_extraction")
    assert taken["claims"] == [{"statement": "It works.", "holds": False}]
    assert after == {name: found for name, found in before.items() if name != "01_extraction"}


def test_a_report_of_few_images_brings_nothing(tmp_path, page):
    _report(tmp_path / "reports", "smoke")
    before = results.MEASURED.read_text()
    with pytest.raises(MoeeError, match="preset small"):
        results.main(["--report", str(tmp_path / "reports"), "--machine", "two slow cores"])
    assert results.MEASURED.read_text() == before
    assert "77.7" not in page.read_text()
