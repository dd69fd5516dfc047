"""What a page needs for readers who do not see it, or use no mouse."""

from __future__ import annotations

from collections.abc import Mapping

from bs4 import BeautifulSoup
from bs4.element import Tag


def accessible(body: str, findings: Mapping[str, str]) -> str:
    """``body`` of a page with tables that a screen reader and a keyboard can go through.

    ``findings`` are by the alternative text of a figure; each is also written below its figure,
    for everybody who sees. Screen readers have heard it before.
    """
    soup = BeautifulSoup(body, "html.parser")
    for table in soup.find_all("table"):
        _name_headers(table)
        _let_scroll(table, soup)
    for image in soup.find_all("img"):
        if image.get("alt") in findings:
            image.insert_after(_told(findings[image["alt"]], soup))
    return str(soup)


def told_below(finding: str) -> str:
    """``finding`` as the line below a figure that has it in its alternative text as well."""
    return str(_told(finding, BeautifulSoup("", "html.parser")))


def _told(finding: str, soup: BeautifulSoup) -> Tag:
    line = soup.new_tag("p", attrs={"class": "finding", "aria-hidden": "true"})
    line.string = finding
    return line


def _name_headers(table: Tag) -> None:
    """Say what a header is the header of; a header without words is none."""
    head = table.find("thead")
    if head is not None and not head.get_text(strip=True):
        head.decompose()
    for header in table.find_all("th"):
        if header.get_text(strip=True):
            header["scope"] = "col" if header.find_parent("thead") else "row"
        else:
            header.name = "td"


def _let_scroll(table: Tag, soup: BeautifulSoup) -> None:
    """Put the table in a frame that the arrow keys scroll where it is wider than the page."""
    frame = soup.new_tag(
        "div", attrs={"class": "wide", "tabindex": "0", "role": "group", "aria-label": "Table"}
    )
    table.wrap(frame)
