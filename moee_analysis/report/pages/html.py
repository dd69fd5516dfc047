"""HTML that stands alone: no script, no font, no picture from anywhere else."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path
from urllib.parse import quote

from bs4 import BeautifulSoup
from bs4.element import Tag

from moee_analysis.outside_text import printable

GENERATOR = "moee-analysis"
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)
"""Content security policy: the browser itself refuses to fetch, to run or to send anything."""

ACTIVE = ("script", "iframe", "object", "embed", "link", "base", "meta", "audio", "video")
LOADING = ("src", "srcset", "poster", "background", "data", "xlink:href")


def document(title: str, body: str) -> str:
    """Return a complete page with the report's style sheet inside."""
    css = Path(__file__).with_name("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="{GENERATOR}">
<title>{escape(title)}</title>
<style>
{css}</style>
</head>
<body>
{body}
</body>
</html>
"""


def link(path: str, words: str) -> str:
    """A link to a file, by its ``path`` from the page's folder, whatever it is called."""
    return f'<a href="{quote(os.fsencode(path))}">{escape(printable(words))}</a>'


def standing_alone(fragment: str) -> str:
    """``fragment`` without scripts and without anything a browser would fetch.

    A picture on the network becomes a link to it.
    """
    soup = BeautifulSoup(fragment, "html.parser")
    for tag in soup(ACTIVE):
        tag.decompose()
    for tag in soup("style"):
        if _fetches(tag.get_text()):
            tag.decompose()
    for tag in soup.find_all():
        _quieten(tag, soup)
    return str(soup)


def _quieten(tag: Tag, soup: BeautifulSoup) -> None:
    """Take from one tag what fetches or runs."""
    source = str(tag.get("src", ""))
    if tag.name == "img" and not source.startswith("data:"):
        link = soup.new_tag("a", href=source)
        link.string = str(tag.get("alt") or source)
        tag.replace_with(link)
        return
    for name in list(tag.attrs):
        value = str(tag[name])
        loads = name in LOADING and not value.startswith(("data:", "#"))
        draws = tag.name in ("image", "use") and name == "href" and not value.startswith("#")
        if loads or draws or name.startswith("on") or (name == "style" and _fetches(value)):
            del tag[name]


def _fetches(css: str) -> bool:
    return "@import" in css or "url(" in css
