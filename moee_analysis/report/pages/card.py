"""A notebook's card on the index: key figure and number, the dense model beside it, claims."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from moee_analysis.report.pages.html import link
from moee_analysis.report.pages.page import PAGE, data_uri
from moee_analysis.report.results import alternative, readable

COVER_PIXELS = (760, 760)
STATUSES = {
    "ok": '<span class="good">✓ ran</span>',
    "cell_error": '<span class="bad">✗ a cell failed</span>',
    "timeout": '<span class="bad">✗ stopped: too slow</span>',
    "dead_kernel": '<span class="bad">✗ its kernel died</span>',
}
TALLIES = {
    True: ("good", "✓ {} holds", "✓ {} hold"),
    None: ("half", "◐ {} holds in part", "◐ {} hold in part"),
    False: ("bad", "✗ {} does not", "✗ {} do not"),
}
SOURCES = {True: "tested here", False: "the paper says"}


def card(folder: Path, status: dict[str, Any], found: dict[str, Any]) -> str:
    """One notebook: cover, title, summary, key number, claims, status and seconds."""
    ending = STATUSES[status["status"]]
    return f"""<article class="card">
{_cover(folder, found)}
<div class="text">
<h2>{link(f"{folder.name}/{PAGE}", status["title"])}</h2>
<p>{escape(status["summary"])}</p>
<div class="found">
{_headline(found)}{_error(status)}{_claims(found.get("claims", []))}
<p class="ending">{ending} · {status["seconds"]:.0f} s</p>
</div>
</div>
</article>"""


def _cover(folder: Path, found: dict[str, Any]) -> str:
    """The cover figure, else the first one, small enough to carry."""
    figures = list(found.get("figures", {}).values())
    chosen = next((f for f in figures if f.get("cover")), figures[0] if figures else None)
    if chosen is None:
        return '<div class="cover">no figure</div>'
    alt = escape(alternative(chosen))
    return f'<img class="cover" src="{_thumbnail(folder / chosen["file"])}" alt="{alt}">'


def _thumbnail(path: Path) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail(COVER_PIXELS)
        small.save(buffer, format="WEBP", quality=88)
    return data_uri(buffer.getvalue(), "webp")


def _headline(found: dict[str, Any]) -> str:
    """The key number, and below it what the dense model comes to."""
    headline = found.get("headline")
    if headline is None:
        return ""
    value, label = escape(readable(headline["value"])), escape(headline["label"])
    return (
        f'<p class="headline"><b>{value}</b> <span>{label}</span></p>\n'
        f'<p class="dense"><b>Dense:</b> {escape(headline["dense"])}</p>\n'
    )


def _error(status: dict[str, Any]) -> str:
    return f'<p class="error">{escape(status["error"])}</p>\n' if status.get("error") else ""


def _claims(claims: Sequence[dict[str, Any]]) -> str:
    """How many claims hold, and behind a fold which."""
    if not claims:
        return ""
    verdicts = [claim["holds"] for claim in claims]
    tallies = ", ".join(
        _tally(holds, verdicts.count(holds)) for holds in TALLIES if holds in verdicts
    )
    many = "1 claim" if len(claims) == 1 else f"{len(claims)} claims"
    every = "".join(_claim(claim) for claim in claims)
    return (
        f'<details class="claims"><summary>{many}: {tallies}</summary>\n<ul>{every}</ul></details>'
    )


def _tally(holds: bool | None, count: int) -> str:  # noqa: FBT001
    colour, one, several = TALLIES[holds]
    return f'<span class="{colour}">{(one if count == 1 else several).format(count)}</span>'


def _claim(claim: dict[str, Any]) -> str:
    colour, *_ = TALLIES[claim["holds"]]
    source = SOURCES[claim.get("ours", False)]
    verdict, statement = escape(claim["verdict"]), escape(claim["statement"])
    return f'<li><b class="{colour}">{verdict}</b>, {source}: {statement}</li>'
