"""The findings of a notebook: in files that other programs can read, and as it shows them."""

import base64
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

from moee_analysis.errors import MoeeError
from moee_analysis.outside_text import as_markdown
from moee_analysis.utils.storage.files import new_file, write_json
from moee_analysis.utils.storage.refusals import writing

FILE, STATUS, NOTEBOOK = "results.json", "status.json", "notebook.ipynb"  # of a notebook's run
CSS_PIXELS_PER_INCH = 96
TABLE_ROWS = 64  # shown at most
SUMMARY_LINES, SUMMARY_WORDS = 3, 60  # of what a notebook found; of one of its lines, about


def read(path: Path) -> dict[str, Any]:
    """The content of one of these, or of another JSON file of ours; nothing if it is not there."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


@dataclass(frozen=True)
class Results:
    """Numbers, tables, figures and claims of one notebook run: the ``content`` of ``results.json``.

    With a ``folder`` it is written anew, atomically, after every addition.
    """

    folder: Path | None = None
    content: dict[str, Any] = field(default_factory=dict)

    def put(self, section: str, value: Any) -> None:
        """Set ``section`` of the results."""
        self.content[section] = plain(value)
        if self.folder is not None:
            write_json(self._place(FILE), self.content)

    def put_into(self, section: str, key: str, value: Any) -> None:
        """Set ``key`` in the mapping ``section``."""
        self.put(section, self.content.get(section, {}) | {key: plain(value)})

    def append(self, section: str, value: Any) -> None:
        """Add ``value`` to the list ``section``."""
        self.put(section, [*self.content.get(section, []), value])

    def keep(self, section: str, name: str, kind: str, content: bytes, **facts: Any) -> None:
        """Keep ``content`` as ``<section>/<name>.<kind>``, with its ``facts`` that are known."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
            hint = "choose a short name: a file is called by it"
            raise MoeeError("a name of letters, digits, '_' and '-'", repr(name), hint)
        file = f"{section}/{name}.{kind}"
        if self.folder is not None:
            with new_file(self._place(file), wanted=len(content)) as partial:
                partial.write_bytes(content)
        known = {fact: value for fact, value in facts.items() if value is not None}
        self.put_into(section, name, {"file": file} | known)

    def summary(self) -> list[str]:
        """Return Markdown lines: the headline, then claims, then what figures show."""
        headline, figures = self.content.get("headline"), self.content.get("figures", {}).values()
        lines = [in_words(headline)] if headline else []
        for claim in self.content.get("claims", []):
            left = SUMMARY_WORDS - len(claim["statement"].split())
            statement = claim["statement"].rstrip(".")
            told = as_markdown(f"{statement}: {brief(claim['found'], left)}")
            lines.append(f"{claim['verdict']}: {told}")
        lines += [as_markdown(brief(each["finding"])) for each in figures if each.get("finding")]
        return lines[:SUMMARY_LINES]

    def _place(self, file: str) -> Path:
        assert self.folder is not None
        path = self.folder / file
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        return path


def plain(value: Any) -> Any:
    """``value`` in JSON's types: NumPy's become Python's, numbers that are not finite None."""
    if isinstance(value, (str, int)) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    expected = "numbers, text, lists and mappings to record"
    hint = "record the numbers inside it, or keep it as a table or a figure"
    raise MoeeError(expected, f"a {type(value).__name__}", hint)


def in_words(headline: Mapping[str, Any]) -> str:
    """The key number of a notebook as Markdown, beside the dense model's."""
    number, label = as_markdown(readable(headline["value"])), as_markdown(headline["label"])
    return f"**{number}** {label} (dense: {as_markdown(headline['dense'])})"


def brief(text: str, words: int = SUMMARY_WORDS) -> str:
    """The first sentences and clauses of ``text``, with about so many ``words``."""
    clauses = re.split(r"(?<=[.;]) (?![^(]*\))", text)  # none ends within brackets
    lengths = np.cumsum([len(clause.split()) for clause in clauses])
    return " ".join(clauses[: max(1, int((lengths <= words).sum()))]).rstrip(".;") + "."


_DRAWN: WeakKeyDictionary[Figure, bytes] = WeakKeyDictionary()


def picture(fig: Figure, *, dpi: float | None = None) -> bytes:
    """``fig`` as PNG, at the resolution of the house style or ``dpi``, without date or version."""
    if dpi is None and fig in _DRAWN and not fig.stale:  # kept first, and shown then
        return _DRAWN[fig]
    buffer = io.BytesIO()
    options = {"bbox_inches": "tight", "facecolor": "white", "metadata": {"Software": None}}
    fig.savefig(buffer, format="png", dpi=dpi or fig.dpi, **options)
    if dpi is None:
        _DRAWN[fig], fig.stale = buffer.getvalue(), False
    return buffer.getvalue()


def alt_text(figure: Mapping[str, Any]) -> str:
    """The alternative text of a kept figure: its ``finding``, then its ``caption``."""
    return " ".join(text for kind in ("finding", "caption") if (text := figure.get(kind)))


def readable(value: float | str | None) -> str:
    """``value`` as a reader likes it: three digits that count, a narrow space per thousand."""
    if value is None:
        return "not defined"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or abs(value) >= 1000:
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:#.3g}".rstrip(".")


def is_plain_index(table: pd.DataFrame) -> bool:
    """Whether the index only counts the rows, so that a file is better without it."""
    return isinstance(table.index, pd.RangeIndex) and table.index.name is None


def two_columns(rows: dict[str, Any]) -> str:
    """``rows`` as a Markdown table of names and values, shown literally."""
    lines = [f"| {as_markdown(key)} | {as_markdown(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|:--|:--|", *lines])


def prepare_display() -> None:
    """Let the running notebook, if any, show figures and tables just as the report does."""
    shell = get_ipython()
    if shell is None:
        return
    plt.close(plt.figure())  # the inline backend sets its own formatter with the first figure
    formatters = shell.display_formatter.formatters
    formatters["image/png"].for_type(Figure, _figure_png)
    formatters["text/html"].for_type(pd.DataFrame, _table_html)


def _figure_png(fig: Figure) -> tuple[str, dict[str, Any]]:
    """Base64 PNG of ``fig``, its width in CSS pixels and the text that describes it."""
    png = picture(fig)
    pixels = int.from_bytes(png[16:20])  # the width in a PNG's header
    width = round(pixels * CSS_PIXELS_PER_INCH / fig.dpi)
    below = ". ".join(text.get_text() for text in fig.texts)
    titles = [ax.get_title("left") or ax.get_title() for ax in fig.axes]
    text = fig.get_label() or below or ", ".join(filter(None, titles))
    facts = {"width": width, "alt": " ".join(text.split()) or "figure"}
    return base64.b64encode(png).decode(), facts


def _table_html(table: pd.DataFrame) -> str:
    """HTML of ``table``, without an index that only counts the rows."""
    return table.to_html(
        index=not is_plain_index(table),
        border=0,
        classes="tex2jax_ignore mathjax_ignore",  # a class may be called $x$
        max_rows=TABLE_ROWS,
        float_format=readable,
        show_dimensions=len(table) > TABLE_ROWS,
    )
