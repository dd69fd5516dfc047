"""How a notebook shows things: the same in JupyterLab and in a report."""

from __future__ import annotations

import base64
import struct
from typing import Any

import pandas as pd
from IPython.display import Markdown
from matplotlib.figure import Figure

from moee_analysis.outside_text import as_markdown
from moee_analysis.report.results import is_plain_index, picture, readable

CSS_PIXELS_PER_INCH = 96
TABLE_ROWS = 64


def markdown(text: str) -> Markdown:
    """``text`` as a notebook output."""
    from IPython.display import Markdown

    return Markdown(text)


def is_figure(shown: object) -> bool:
    """Whether ``shown`` is a figure of matplotlib's."""
    from matplotlib.figure import Figure

    return isinstance(shown, Figure)


def two_columns(rows: dict[str, Any]) -> str:
    """``rows`` as a Markdown table of names and values, shown literally."""
    lines = [f"| {as_markdown(key)} | {as_markdown(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|:--|:--|", *lines])


def prepare_display() -> None:
    """Let the running notebook, if any, show figures and tables just as the report does."""
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        return
    import matplotlib.pyplot as plt
    import pandas as pd
    from matplotlib.figure import Figure

    plt.close(plt.figure())  # the inline backend sets its own formatter with the first figure
    formatters = shell.display_formatter.formatters
    formatters["image/png"].for_type(Figure, _shown_figure)
    formatters["text/html"].for_type(pd.DataFrame, _shown_table)


def _shown_figure(fig: Figure) -> tuple[str, dict[str, Any]]:
    """Base64 PNG of ``fig``, its width in CSS pixels and the text that describes it."""
    png = picture(fig)
    (pixels,) = struct.unpack(">I", png[16:20])  # the width in a PNG's header
    width = round(pixels * CSS_PIXELS_PER_INCH / fig.dpi)
    return base64.b64encode(png).decode(), {"width": width, "alt": _described(fig)}


def _described(fig: Figure) -> str:
    """The label of ``fig``, or else what is written below it, or else its panels' titles."""
    below = [text.get_text() for text in fig.texts]
    titles = [ax.get_title("left") or ax.get_title() for ax in fig.axes]
    said = fig.get_label() or ". ".join(below) or ", ".join(t for t in titles if t)
    return " ".join(said.split()) or "figure"


def _shown_table(table: pd.DataFrame) -> str:
    """HTML of ``table``, without an index that only counts the rows."""
    return table.to_html(
        index=not is_plain_index(table),
        border=0,
        classes="tex2jax_ignore mathjax_ignore",  # a class may be called $x$
        max_rows=TABLE_ROWS,
        float_format=readable,
        show_dimensions=len(table) > TABLE_ROWS,
    )
