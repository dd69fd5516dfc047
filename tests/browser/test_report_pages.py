"""The report as people read it: the index, its pages, with a screen reader, on a telephone."""

import pytest

SCHEMES = ("light", "dark")


@pytest.fixture
def index(report_folder):
    return (report_folder / "index.html").as_uri()


def pages(report_folder):
    return sorted(report_folder.glob("*/page.html"))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_the_index_is_readable_everywhere(open_page, index, problems, scheme, width):
    page = open_page(index, width=width, scheme=scheme, bypass_csp=True)
    assert problems(page, f"index_{width}_{scheme}") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_every_card_has_a_figure_a_number_and_the_dense_model(open_page, index, report_folder):
    page = open_page(index)
    cards = page.locator("article.card")
    assert cards.count() == len(pages(report_folder))
    for place in range(cards.count()):
        card = cards.nth(place)
        figure = card.locator("img")
        assert figure.evaluate("image => image.complete && image.naturalWidth > 100")
        assert any(letter.isdigit() for letter in figure.get_attribute("alt"))
        assert card.locator(".headline b").inner_text().strip()
        assert card.locator(".dense").inner_text().startswith("Dense: ")


def test_a_card_leads_to_its_page_and_back(open_page, index):
    page = open_page(index)
    name = page.locator("article.card h2").first.inner_text()
    page.locator("article.card h2 a").first.click()
    page.wait_for_url("**/page.html")
    assert page.locator("h1").first.inner_text() == name
    page.get_by_role("link", name="All notebooks").click()
    page.wait_for_url("**/index.html")


def test_code_and_solutions_are_out_of_sight_until_asked_for(open_page, report_folder):
    page = open_page(pages(report_folder)[0].as_uri())
    code = page.locator(".page .code_cell .input").first
    assert not code.is_visible()
    page.get_by_role("checkbox", name="code").check()
    assert code.is_visible()
    fold = page.locator("details.solution").first
    assert not fold.locator(".code_cell").first.is_visible()
    fold.locator("summary").click()
    assert fold.locator(".code_cell").first.is_visible()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_page_is_accessible_and_has_figures_that_say_what_they_show(
    open_page, report_folder, problems, scheme
):
    for path in pages(report_folder):
        page = open_page(path.as_uri(), scheme=scheme, bypass_csp=True)
        assert problems(page, f"page_{path.parent.name}_{scheme}") == [], path.parent.name
        for figure in page.locator("img").all():
            assert len(figure.get_attribute("alt").split()) > 5, path.parent.name


def test_a_page_fits_a_telephone(open_page, report_folder):
    page = open_page(pages(report_folder)[0].as_uri(), width=360)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
