"""Solutions of exercises on a notebook's page: behind a fold, without a script."""

from __future__ import annotations

from bs4 import BeautifulSoup
from bs4.element import Tag

SOLUTION = "solution"
"""Tag of the cells that solve an exercise, and class of their fold."""


def folded(body: str) -> str:
    """``body`` of a page with each exercise's solution in a closed ``<details>``.

    Cells of one solution, which follow each other, share a fold. It is open if one of them failed.
    """
    soup = BeautifulSoup(body, "html.parser")
    for cell in soup.find_all(class_=f"celltag_{SOLUTION}"):
        fold = _fold_before(cell, soup)
        if cell.find(class_="output_error"):
            fold["open"] = ""
        fold.append(cell)
    return str(soup)


def _fold_before(cell: Tag, soup: BeautifulSoup) -> Tag:
    """The fold that ends where ``cell`` begins; a new one, if there is none."""
    before = cell.find_previous_sibling()
    if before is not None and before.name == "details":
        return before
    fold = soup.new_tag("details", attrs={"class": SOLUTION})
    summary = soup.new_tag("summary")
    summary.string = "Solution"
    fold.append(summary)
    cell.insert_before(fold)
    return fold
