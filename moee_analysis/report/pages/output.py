"""What a cell printed: put together as a terminal shows it, and short enough for a page.

The time is in proportion to the text, also for millions of characters on one line.
"""

from __future__ import annotations

import re
from typing import Any

from nbformat import NotebookNode

LONGEST = 20_000
"""Characters of one output on a page."""

LONGEST_MARKUP = 400_000
"""Characters of HTML, SVG and the like in one output; a page with more takes long to be made."""

LEFT_OUT = "[{} are left out here; the notebook has them]"

ESCAPES = re.compile(r"\x1b\[[^@-~\n]*[@-~]")
"""Sequences that colour text or move the cursor."""


def join_streams(cell: NotebookNode) -> None:
    """Put all that ``cell`` printed into one output for each stream, where it first printed.

    Of the two, the standard output comes first if nothing stands between them.
    """
    printed: dict[str, list[str]] = {}
    kept: list[Any] = []
    for output in cell.outputs:
        if output.output_type != "stream":
            kept.append(output)
            continue
        if output.name not in printed:
            kept.append(output)
        printed.setdefault(output.name, []).append(output.text)
    places = {output.name: n for n, output in enumerate(kept) if output.output_type == "stream"}
    for name, place in places.items():
        kept[place].text = as_typed("".join(printed[name]))
    if "stdout" in places and places["stdout"] - 1 == places.get("stderr"):
        place = places["stdout"]
        kept[place - 1 : place + 1] = kept[place], kept[place - 1]
    cell.outputs = kept


def as_typed(text: str) -> str:
    r"""What of ``text`` can be seen: ``\r`` goes back to the line's start, ``\b`` by a letter."""
    return "\n".join(_line_as_typed(line) for line in text.split("\n"))


def _line_as_typed(line: str) -> str:
    last = line.rstrip("\r").rpartition("\r")[2]
    if "\b" not in last:
        return last
    seen: list[str] = []
    for letter in last:
        if letter != "\b":
            seen.append(letter)
        elif seen:
            seen.pop()
    return "".join(seen)


def shorten(output: NotebookNode) -> None:
    """Leave out the middle of an ``output`` that is too long to be read, or for a browser."""
    if output.output_type == "stream":
        output.text = shortened(output.text)
    elif output.output_type == "error":
        output.traceback = [shortened(part) for part in output.traceback]
    else:
        _shorten_data(output.data)


def _shorten_data(data: dict[str, Any]) -> None:
    """Shorten plain text; half of any markup is none, so that goes, and plain text tells it."""
    told = [shortened(data.pop("text/plain"))] if "text/plain" in data else []
    markup = [kind for kind in data if kind.startswith("text/") or kind == "image/svg+xml"]
    heavy = [kind for kind in markup if len(data[kind]) > LONGEST_MARKUP]
    told += [LEFT_OUT.format(f"{len(data.pop(kind))} characters of {kind}") for kind in heavy]
    if told:
        data["text/plain"] = "\n".join(told)


def shortened(text: str) -> str:
    """``text``, or its beginning and end without colours if it is longer than :data:`LONGEST`."""
    if len(text) <= LONGEST:
        return text
    plain = ESCAPES.sub("", text)
    left_out, half = len(plain) - LONGEST, LONGEST // 2
    if left_out <= 0:
        return plain
    note = LEFT_OUT.format(f"{left_out} characters")
    return f"{plain[:half]}\n{note}\n{plain[-half:]}"
