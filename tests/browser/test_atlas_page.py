"""The atlas as people use it: with a pointer, with keys, on a telephone, in the dark."""

import re
from dataclasses import replace

import pytest

from moee_analysis import measure
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.run import Extraction
from moee_analysis.report.atlas import write_atlas
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_vit


def title(page):
    return page.locator("#expert-title").inner_text()


def text(page, selector):
    return page.locator(selector).inner_text()


@pytest.fixture
def page(open_page, atlas_file):
    return open_page(atlas_file.as_uri())


def test_it_opens_at_once_with_an_expert_and_crops_that_show_something(page, shots):
    page.screenshot(path=shots / "atlas.png", full_page=True)
    assert re.fullmatch(r"Layer \d+, expert \d+", title(page))
    assert page.locator("#top canvas").count() > 0
    page.wait_for_function(
        """() => [...document.querySelectorAll("#top canvas, #across canvas")].every((canvas) =>
        canvas.getContext("2d").getImageData(0, 0, 20, 20).data.some((value) => value > 0))"""
    )


def test_the_pointer_chooses_layers_experts_neighbours_and_typical_patches(page):
    page.locator("#layers label").last.click()
    assert title(page).startswith("Layer 11, ")
    last = page.locator("#experts label").last
    last.click()
    assert title(page) == f"Layer 11, expert {last.locator('span').inner_text()}"
    before = title(page)
    page.locator("#tables button").first.click()
    assert title(page) != before
    crop = page.locator("#top button").nth(1)
    name = crop.locator("span").inner_text()
    crop.click()
    assert text(page, "#image-title").endswith(f": {name}")
    assert "expert " + title(page).split()[-1] in text(page, "#patch-told")


def test_keys_choose_a_layer_and_an_expert(page):
    page.locator("#layers input:checked").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    before = title(page)
    page.keyboard.press("ArrowRight")
    assert title(page) != before
    checked = page.locator("#experts input:checked")
    assert title(page).endswith(f"expert {checked.get_attribute('value')}")
    assert checked.evaluate("element => element === document.activeElement")


def test_a_patch_under_the_pointer_or_by_arrows_tells_its_expert_in_every_layer(page, shots):
    cells = page.locator("#patches [role=gridcell]")
    cells.nth(9).hover()
    first = text(page, "#across")
    assert text(page, "#patch-told").startswith("Row 1, column 1: expert ")
    cells.nth(54).hover()
    assert text(page, "#across") != first
    assert page.locator("#across li").count() == page.locator("#layers label").count()
    page.screenshot(path=shots / "atlas_patch.png")
    page.locator("#patches [tabindex='0']").focus()
    for key in ("ArrowDown", "ArrowUp", "ArrowUp", "ArrowLeft", "ArrowRight"):
        page.keyboard.press(key)
    label = page.locator("#patches :focus").get_attribute("aria-label")
    page.keyboard.press("Enter")
    assert title(page).endswith(label.split(": ")[1])


def test_images_are_browsed_by_class_and_the_address_keeps_what_is_chosen(page, open_page):
    page.locator("#class").select_option(index=3)
    wanted = page.locator("#class").input_value()
    for _ in range(4):
        assert text(page, "#image-title").endswith(f": {wanted}")
        page.locator("#next").click()
    assert page.locator("#strip input").count() < 60
    page.locator("#layers label").nth(2).click()
    page.locator("#patches [role=gridcell]").nth(20).click()
    again = open_page(page.url)
    assert title(again) == title(page)
    for part in ("#image-title", "#patch-told", "#said"):
        assert text(again, part) == text(page, part)


def test_an_address_that_makes_no_sense_is_taken_as_none(open_page, atlas_file):
    odd = open_page(f"{atlas_file.as_uri()}#layer=99&expert=-1&image=1e9&patch=a,7")
    assert re.fullmatch(r"Layer \d+, expert \d+", title(odd))


def test_what_the_page_says_is_what_the_run_does(page, small_atlas):
    """The experts of an image's patches, read off the page, are those that ``routes`` finds."""
    routed = measure.routes(*small_atlas)
    page.locator("#strip label").nth(5).click()
    layer = int(text(page, "#layers input:checked + span"))
    labels = page.locator("#patches [role=gridcell]").evaluate_all(
        "cells => cells.map((cell) => Number(cell.getAttribute('aria-label').split('expert ')[1]))"
    )
    assert labels == routed.patch_experts(layer)[5].ravel().tolist()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280, 1920])
def test_it_is_readable_everywhere(open_page, atlas_file, problems, scheme, width):
    page = open_page(atlas_file.as_uri(), width=width, scheme=scheme, bypass_csp=True)
    assert problems(page, f"atlas_{width}_{scheme}") == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_names_that_are_markup_are_only_names(open_page, tmp_path):
    """Class folders may be called anything: nothing of it is run, or shown as something else."""
    nasty = "<img src=x onerror=alert(1)></script><script>document.title='taken'</script>"
    images = replace(toy_images(12), folders=(nasty,) * 12)
    run = Extraction(toy_moe(toy_vit()), ExtractConfig(), None, (), {"model": "<b>toy</b>"})
    page = open_page(write_atlas(run, images, tmp_path / "atlas.html").as_uri())
    assert page.title() == "Expert atlas"
    assert text(page, "#image-title").endswith(f": {nasty}")
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 2
    assert page.locator("#class option").nth(1).inner_text() == nasty
