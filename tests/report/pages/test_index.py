import pytest
from bs4 import BeautifulSoup
from PIL import Image

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
        (folder / "figures").mkdir(parents=True)
        for figure in found.get("figures", {}).values():
            Image.new("RGB", (40, 30), "teal").save(folder / figure["file"])
        write_json(folder / "results.json", found)
        write_json(folder / "status.json", RAN | status)
        write_index(tmp_path, [folder])
        return BeautifulSoup((tmp_path / "index.html").read_text(), "html.parser")

    return written


def test_a_card_has_the_key_number_the_dense_model_beside_it_its_claims_and_the_cover(index):
    page = index(FOUND)
    summary = " ".join(page.find(class_="summary").get_text().split())
    assert summary == "The notebook ran to its end. Of 2 claims of the paper, 2 hold here."
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


def test_without_a_cover_the_first_figure_stands_for_the_notebook(index):
    figures = {"one": FOUND["figures"]["one"], "two": {"file": "figures/two.png"}}
    assert index(FOUND | {"figures": figures}).article.img["alt"] == "It rises. in layer 3"


def test_a_run_that_found_nothing_has_a_card_too(index):
    page = index({}, status="cell_error", error="ValueError: <no>")
    assert "0 of 1 notebooks ran to their end." in page.find(class_="summary").get_text()
    assert "✗ a cell failed" in page.article.get_text()
    assert page.article.find(class_="error").get_text() == "ValueError: <no>"
    assert not page.article.find_all(class_=["headline", "dense", "claims"])


def test_the_footer_tells_where_and_when_the_numbers_were_made(index):
    page = index(FOUND)
    footer = page.body.find("footer")
    told = dict(zip(*([d.get_text() for d in footer(kind)] for kind in ("dt", "dd")), strict=True))
    assert told == {
        "Device": "cuda (fast)", "CPU cores": "16", "PyTorch": "7.8", "Time": "1 h 2 min",
        "Date": "2026-01-02 03:04 UTC",
    }  # fmt: skip
    assert [item.get_text() for item in footer.details("li")] == ["torch 7.8", "numpy 9.10"]
    # every part is in a landmark, and headings go down by one
    assert page.html["lang"] == "en"
    (frame,) = page.body.find_all(recursive=False)
    assert [p.name for p in frame.find_all(recursive=False)] == ["header", "main", "footer"]
    assert [heading.name for heading in page.find_all(["h1", "h2", "h3"])] == ["h1", "h2"]
