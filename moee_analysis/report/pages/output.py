"""The output of cells: put together as a terminal shows it, and short enough for a page.

The time is in proportion to the text, also for millions of characters on one line.
"""

import re
from typing import Any

from nbformat import NotebookNode

LONGEST = 20_000  # characters of text in one output on a page
LONGEST_MARKUP = 400_000  # characters of HTML, SVG and the like; more takes long to be made
LEFT_OUT = "[{} are left out here; the notebook has them]"
ESCAPES = re.compile(r"\x1b\[[^@-~\n]*[@-~]")  # these colour text or move the cursor


def join_streams(cell: NotebookNode) -> None:
    """Put all that ``cell`` printed into one output for each stream, where it first printed.

    Of the two, the standard output comes first if nothing stands between them.
    """
    printed: dict[str, list[str]] = {}
    outputs: list[Any] = []
    for output in cell.outputs:
        if output.output_type != "stream" or output.name not in printed:
            outputs.append(output)
        if output.output_type == "stream":
            printed.setdefault(output.name, []).append(output.text)
    places = {output.name: n for n, output in enumerate(outputs) if output.output_type == "stream"}
    for name, place in places.items():
        outputs[place].text = as_typed("".join(printed[name]))
    place = places.get("stdout", 0)
    if place and places.get("stderr") == place - 1:
        outputs[place - 1 : place + 1] = outputs[place], outputs[place - 1]
    cell.outputs = outputs


def as_typed(text: str) -> str:
    r"""The part of ``text`` that is seen: ``\r`` goes to the line's start, ``\b`` back a letter."""
    lines = []
    for line in text.split("\n"):
        last = line.rstrip("\r").rpartition("\r")[2]
        seen: list[str] = []
        for letter in last if "\b" in last else ():
            if letter != "\b":
                seen.append(letter)
            elif seen:
                seen.pop()
        lines.append("".join(seen) if "\b" in last else last)
    return "\n".join(lines)


def shorten(output: NotebookNode) -> None:
    """Leave out the middle of an ``output`` that is too long to be read, or for a browser.

    Half of any markup is none, so that goes as a whole, and plain text says so.
    """
    if output.output_type == "stream":
        output.text = abridge(output.text)
        return
    if output.output_type == "error":
        output.traceback = [abridge(part) for part in output.traceback]
        return
    data = output.data
    lines = [abridge(data.pop("text/plain"))] if "text/plain" in data else []
    for kind in list(data):
        markup = kind.startswith("text/") or kind == "image/svg+xml"
        if markup and len(data[kind]) > LONGEST_MARKUP:
            lines.append(LEFT_OUT.format(f"{len(data.pop(kind))} characters of {kind}"))
    if lines:
        data["text/plain"] = "\n".join(lines)


def abridge(text: str) -> str:
    """``text``, or its beginning and end without colours if it is longer than :data:`LONGEST`."""
    if len(text) <= LONGEST:
        return text
    plain = ESCAPES.sub("", text)
    left_out, half = len(plain) - LONGEST, LONGEST // 2
    if left_out <= 0:
        return plain
    note = LEFT_OUT.format(f"{left_out} characters")
    return f"{plain[:half]}\n{note}\n{plain[-half:]}"
