from __future__ import annotations

from bs4 import BeautifulSoup

from moee_analysis.report.pages.accessibility import accessible

IMAGE = '<div><img alt="It rises to 2. layer 3" src="data:,"/></div>'
TABLE = """<table><thead><tr><th></th><th>top-1</th></tr></thead>
<tbody><tr><th>MoEE</th><td>0.9</td></tr></tbody></table>"""


def _made(body: str, findings: dict[str, str] | None = None) -> BeautifulSoup:
    return BeautifulSoup(accessible(body, findings or {}), "html.parser")


def test_a_finding_stands_below_its_figure_and_is_heard_once():
    page = _made(IMAGE, {"It rises to 2. layer 3": "It rises to 2."})
    below = page.img.find_next_sibling()
    assert below.get_text() == "It rises to 2."
    assert below["aria-hidden"] == "true"


def test_a_figure_without_a_finding_stays_as_it_is():
    assert accessible(IMAGE, {"It falls.": "It falls."}) == IMAGE


def test_headers_say_of_what_and_those_without_words_are_none():
    page = _made(TABLE)
    scopes = {header.get_text(): header["scope"] for header in page.find_all("th")}
    assert scopes == {"top-1": "col", "MoEE": "row"}


def test_a_head_without_words_goes():
    page = _made(TABLE.replace("top-1", ""))
    assert page.thead is None
    assert page.th.get_text() == "MoEE"


def test_wide_tables_can_be_scrolled_with_keys():
    frame = _made(TABLE).table.parent
    assert (frame["tabindex"], frame["role"], frame["aria-label"]) == ("0", "group", "Table")
