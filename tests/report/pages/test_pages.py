"""The pages of a report: index, notebooks, and the output of their cells."""

import pytest
from bs4 import BeautifulSoup
from nbformat.v4 import new_code_cell, new_output
from PIL import Image

from moee_analysis.report.pages.body import refine
from moee_analysis.report.pages.output import (
    LONGEST,
    LONGEST_MARKUP,
    abridge,
    as_typed,
    join_streams,
    shorten,
)
from moee_analysis.report.pages.site import write_index
from moee_analysis.utils.storage.files import write_json

RAN = {"status": "ok", "seconds": 3725.0, "title": "A <notebook>", "summary": "What it shows."}
CLAIMS = [
    {"statement": "s", "found": "f", "holds": True, "verdict": "✓ holds"},
    {"statement": "<t>", "found": "g", "holds": False, "verdict": "✗ does not", "ours": True},
    {"statement": "u", "found": "h", "holds": True, "verdict": "✓ holds"},
]
FOUND = {
    "headline": {"label": "of <everything>", "value": 0.4567, "dense": "<all> of it"},
    "claims": CLAIMS,
    "figures": {
        "one": {"file": "figures/one.png", "finding": "It rises.", "caption": "in layer 3"},
        "two": {"file": "figures/two.png", "finding": "It falls.", "cover": True},
    },
    "environment": {
        "device": "cuda (fast)", "cores": 16, "seconds": 9, "finished": "2026-01-02T03:04:05+00:00",
        "versions": {"torch": "7.8", "numpy": "9.10"},
    },
}  # fmt: skip


@pytest.fixture
def index(tmp_path):
    """The index of a run that found what is given."""

    def written(found, **status):
        folder = tmp_path / "one"
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for figure in found.get("figures", {}).values():
            Image.new("RGB", (40, 30), "teal").save(folder / figure["file"])
        write_json(folder / "results.json", found)
        write_json(folder / "status.json", RAN | status)
        write_index(tmp_path, [folder], {}, {})
        return BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser")

    return written


def test_a_card_has_the_key_number_the_dense_model_beside_it_its_claims_and_the_cover(index):
    page = index(FOUND)
    summary = " ".join(page.find(class_="summary").get_text().split())
    assert summary == "The notebook ran to its end. Of 2 claims of the papers, 2 hold here."
    card = page.article
    assert card.find(class_="headline").get_text() == "0.457 of <everything>"
    assert card.find(class_="dense").get_text() == "Dense: <all> of it"
    assert card.img["alt"] == "It falls."
    claims = card.find("details", class_="claims")
    assert claims.summary.get_text() == "3 claims: ✓ 2 hold, ✗ 1 does not"
    assert not claims.has_attr("open")
    assert [item.get_text() for item in claims.find_all("li")] == [
        "✓ holds, the paper says: s", "✗ does not, tested here: <t>", "✓ holds, the paper says: u",
    ]  # fmt: skip
    figures = {"one": FOUND["figures"]["one"], "two": {"file": "figures/two.png"}}
    assert index(FOUND | {"figures": figures}).article.img["alt"] == "It rises. in layer 3"


def test_a_run_that_found_nothing_has_a_card_too(index):
    page = index({}, status="cell_error", error="ValueError: <no>")
    assert "0 of 1 notebooks ran to their end." in page.find(class_="summary").get_text()
    assert "✗ a cell failed" in page.article.get_text()
    assert page.article.find(class_="error").get_text() == "ValueError: <no>"
    assert not page.article.find_all(class_=["headline", "dense", "claims"])


def test_runs_of_an_earlier_report_keep_their_cards_and_those_to_come_are_named(index, tmp_path):
    index(FOUND)
    (tmp_path / "one").rename(tmp_path / "two")
    assert len(index(FOUND)("article")) == 1  # what has no page is no run
    (tmp_path / "two" / "page.html").touch()
    mine, earlier = [card.find(class_="ending").get_text() for card in index(FOUND)("article")]
    assert "of an earlier report" in earlier
    assert "earlier" not in mine
    write_index(tmp_path, [tmp_path / "one"], {"<a>": "running", "b": "waiting"}, {})
    page = BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser")
    summary = " ".join(page.find(class_="summary").get_text().split())
    assert summary.startswith("2 of 4 notebooks ran to their end.")
    assert summary.endswith("Others come: <a> (running), b (waiting).")


def test_the_footer_tells_where_and_when_the_numbers_were_made(index):
    page = index(FOUND)
    footer = page.body.find("footer")
    told = dict(zip(*([d.get_text() for d in footer(kind)] for kind in ("dt", "dd")), strict=True))
    assert told == {
        "Device": "cuda (fast)", "CPU cores": "16", "PyTorch": "7.8",
        "Notebooks' time": "1 h 2 min", "Date": "2026-01-02 03:04 UTC",
    }  # fmt: skip
    assert [item.get_text() for item in footer.details("li")] == ["torch 7.8", "numpy 9.10"]
    # every part is in a landmark, and headings go down by one
    assert page.html["lang"] == "en"
    (frame,) = page.body.find_all(recursive=False)
    assert [p.name for p in frame.find_all(recursive=False)] == ["header", "main", "footer"]
    assert [heading.name for heading in page.find_all(["h1", "h2", "h3"])] == ["h1", "h2"]


IMAGE = '<div><img alt="It rises to 2. layer 3" src="data:,"/></div>'
TABLE = """<table><thead><tr><th></th><th>top-1</th></tr></thead>
<tbody><tr><th>MoEE</th><td>0.9</td></tr></tbody></table>"""
SOLUTION = '<div class="cell code_cell celltag_solution"><div class="{}">1 / 0</div></div>'


def refined(body, findings=()):
    return BeautifulSoup(refine(body, dict(findings)), "html.parser")


def test_a_finding_stands_below_its_figure_and_is_heard_once():
    page = refined(IMAGE, {"It rises to 2. layer 3": "It rises to 2."})
    below = page.img.find_next_sibling()
    assert below.get_text() == "It rises to 2."
    assert below["aria-hidden"] == "true"
    assert refine(IMAGE, {"It falls.": "It falls."}) == IMAGE


def test_headers_say_of_what_and_those_without_words_are_none():
    page = refined(TABLE)
    scopes = {header.get_text(): header["scope"] for header in page.find_all("th")}
    assert scopes == {"top-1": "col", "MoEE": "row"}
    frame = page.table.parent  # which keys scroll
    assert (frame["tabindex"], frame["role"], frame["aria-label"]) == ("0", "group", "Table")
    page = refined(TABLE.replace("top-1", ""))
    assert page.thead is None
    assert page.th.get_text() == "MoEE"


def test_cells_of_a_solution_share_a_fold_which_stands_open_where_one_failed():
    fine, failed = SOLUTION.format("output_text"), SOLUTION.format("output_error")
    page = refined(f"<div>{fine}{fine}<p>Next</p>{fine}{failed}</div>")
    first, second = page.find_all("details", class_="solution")
    assert [fold.summary.get_text() for fold in (first, second)] == ["Solution", "Solution"]
    assert [len(fold.find_all(class_="cell")) for fold in (first, second)] == [2, 2]
    assert (first.has_attr("open"), second.has_attr("open")) == (False, True)


def test_nothing_runs_or_is_fetched_and_pictures_that_are_inside_stay():
    assert refine(IMAGE, {}) == IMAGE
    for body in (
        '<p style="background: url(https://example.org/x)">a</p>',
        "<style>@import url(https://example.org/a.css);</style>",
        '<svg><image href="https://example.org/x"/><use xlink:href="https://example.org/x"/></svg>',
        '<p onclick="x()">a</p><script>x()</script><iframe src="https://example.org/x"></iframe>',
        '<video poster="https://example.org/x"></video><link href="https://example.org/x"/>',
    ):
        assert "example.org" not in refine(body, {})
        assert "x()" not in refine(body, {})
    link = '<a href="https://example.org/far.png">far</a>'
    assert refine('<img alt="far" src="https://example.org/far.png"/>', {}) == link


MANY = 1_000_000


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def test_text_is_what_a_terminal_shows():
    for text, seen in {
        "one\ntwo\n": "one\ntwo\n", "10 %\r20 %\r100 %": "100 %", "": "",
        "10 %\r\n20 %\r\n": "10 %\n20 %\n", "left\rright\rkept\r": "kept",
        "ab\b\bcd\n\b\bx": "cd\nx",
        # steps that grow with the square of the length would take hours
        "x" * MANY: "x" * MANY, "x\b" * MANY: "", "x\r" * MANY: "x",
        "x" * MANY + "\b" * MANY: "", "x\n" * MANY: "x\n" * MANY,
    }.items():  # fmt: skip
        assert as_typed(text) == seen


def test_each_stream_becomes_one_output_where_it_began_standard_output_first():
    result = new_output("display_data", data={"text/plain": "shown"})
    parts = [printed("1 %\r"), result, printed("2 %\r"), printed("oh", "stderr"), printed("3 %")]
    cell = new_code_cell(outputs=parts)
    join_streams(cell)
    assert [(o.get("name"), o.get("text")) for o in cell.outputs] == [
        ("stdout", "3 %"), (None, None), ("stderr", "oh"),
    ]  # fmt: skip
    cell = new_code_cell(outputs=[printed("warned", "stderr"), printed("said")])
    join_streams(cell)
    assert [output.text for output in cell.outputs] == ["said", "warned"]


def test_what_is_too_long_keeps_its_beginning_and_its_end():
    told = abridge(f"first{'x' * MANY}last")
    assert told.startswith("first")
    assert told.endswith("last")
    assert f"[{MANY + 9 - LONGEST} characters are left out here; the notebook has them]" in told
    assert len(told) < LONGEST + 100
    assert abridge("x" * LONGEST) == "x" * LONGEST
    assert abridge("\x1b[31mx\x1b[0m" * (LONGEST // 2)) == "x" * (LONGEST // 2)
    assert "\x1b" not in abridge("\x1b[31mx\x1b[0m" * MANY)
    for output in (
        printed("x" * MANY),
        new_output("execute_result", data={"text/plain": "x" * MANY}),
        new_output("error", ename="E", evalue="x", traceback=["x" * MANY]),
    ):
        shorten(output)
        assert len(str(output)) < LONGEST + 1000


@pytest.mark.parametrize("kind", ["text/html", "text/markdown", "text/latex", "image/svg+xml"])
def test_markup_that_is_too_long_is_left_out_and_that_is_told(kind):
    for plain in ({}, {"text/plain": "x" * MANY}):
        output = new_output("display_data", data={kind: "<b>" * MANY, "image/png": "y", **plain})
        shorten(output)
        assert output.data.keys() == {"image/png", "text/plain"}
        assert f"[{3 * MANY} characters of {kind} are left out here" in output.data["text/plain"]
        assert len(output.data["text/plain"]) < LONGEST + 200
    data = {kind: "x" * LONGEST_MARKUP, "image/png": "y" * MANY}
    output = new_output("display_data", data=dict(data))
    shorten(output)
    assert output.data == data
