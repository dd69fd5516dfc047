"""How a notebook shows its findings: the same in JupyterLab and in a report."""

import base64
import struct
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from IPython import get_ipython
from matplotlib.figure import Figure

from moee_analysis.outside_text import as_markdown
from moee_analysis.report.notebook.results import is_plain_index, picture, readable

CSS_PIXELS_PER_INCH = 96
TABLE_ROWS = 64
VERDICTS = {
    True: ("✓ holds", "good"),
    False: ("✗ does not hold", "bad"),
    None: ("◐ holds in part", "half"),
}
"""Words for a verdict, and the class that colours them on the report's pages."""


def claim_text(claim: dict[str, Any]) -> str:
    """A claim, its finding here and the verdict, as Markdown."""
    verdict, colour = VERDICTS[claim["holds"]]
    source = "Tested here" if claim["ours"] else "The paper says"
    return (
        f"> **{source}** {as_markdown(claim['statement'])}\n>\n"
        f"> **Found here** {as_markdown(claim['found'])}\n>\n"
        f'> <strong class="{colour}">{verdict}</strong>'
    )


def headline_text(label: str, value: float | str, dense: str) -> str:
    """The number that sums a notebook up, and the dense model beside it, as Markdown."""
    number, label, dense = map(as_markdown, (readable(value), label, dense))
    return f"**{number}** {label} (dense: {dense})"


def two_columns(rows: dict[str, Any]) -> str:
    """``rows`` as a Markdown table of names and values, shown literally."""
    lines = [f"| {as_markdown(key)} | {as_markdown(str(value))} |" for key, value in rows.items()]
    return "\n".join(["| | |", "|:--|:--|", *lines])


def on_one_line(facts: dict[str, Any]) -> str:
    """Names and values on a line that breaks between the facts only."""
    return ", ".join(f"{name}\u00a0{value}" for name, value in facts.items())


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
    (pixels,) = struct.unpack(">I", png[16:20])  # the width in a PNG's header
    width = round(pixels * CSS_PIXELS_PER_INCH / fig.dpi)
    return base64.b64encode(png).decode(), {"width": width, "alt": _description(fig)}


def _description(fig: Figure) -> str:
    """The label of ``fig``, or else the text below it, or else its panels' titles."""
    below = ". ".join(text.get_text() for text in fig.texts)
    titles = [ax.get_title("left") or ax.get_title() for ax in fig.axes]
    text = fig.get_label() or below or ", ".join(filter(None, titles))
    return " ".join(text.split()) or "figure"


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
