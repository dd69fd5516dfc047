from bs4 import BeautifulSoup

from moee_analysis.report.pages.body import refine

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
