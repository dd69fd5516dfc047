"""What a notebook says of its numbers: a claim with its verdict, and what a figure shows."""

from __future__ import annotations

from typing import Any

from moee_analysis.outside_text import as_markdown
from moee_analysis.report.results import readable

VERDICTS = {
    True: ("✓ holds", "good"),
    False: ("✗ does not hold", "bad"),
    None: ("◐ holds in part", "half"),
}
"""Words for a verdict, and the class that colours them on the report's pages."""


def claim_text(statement: str, found: str, holds: bool | None, source: str) -> str:  # noqa: FBT001
    """A claim, what was found here and the verdict, as Markdown."""
    verdict, colour = VERDICTS[holds]
    return (
        f"> **{source}** {as_markdown(statement)}\n>\n> **Found here** {as_markdown(found)}\n>\n"
        f'> <strong class="{colour}">{verdict}</strong>'
    )


def headline_text(label: str, value: float | str, dense: str) -> str:
    """The number that sums a notebook up, and the dense model beside it, as Markdown."""
    number, label, dense = map(as_markdown, (readable(value), label, dense))
    return f"**{number}** {label} (dense: {dense})"


def caption_text(
    layer: int | None, site: str | None, tokens: str | None, n: int | None, run: dict[str, Any]
) -> str:
    """Which layer, site, tokens and number of images a figure shows, and the facts of the run."""
    facts = [
        f"layer {layer}" if layer is not None else None,
        site,
        f"{tokens} tokens" if tokens else None,
        f"n = {readable(n)} images" if n is not None else None,
        *(f"{name} {value}" for name, value in run.items()),
    ]
    return ", ".join(fact for fact in facts if fact) + " (layers counted from 0)"


def listed(facts: dict[str, Any]) -> str:
    """Names and values on a line that breaks between the facts only."""
    return ", ".join(f"{name}\u00a0{value}" for name, value in facts.items())
