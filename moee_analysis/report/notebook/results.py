"""The findings of a notebook, in files that other programs can read."""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import new_file, write_json, write_text
from moee_analysis.utils.storage.refusals import writing

FILE, STATUS, NOTEBOOK = "results.json", "status.json", "notebook.ipynb"
"""Files in the folder of a notebook's run."""


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

    def table(self, name: str, table: pd.DataFrame) -> None:
        """Keep ``table`` as ``tables/<name>.csv``."""
        file = f"tables/{_file_name(name)}.csv"
        if self.folder is not None:
            write_text(self._place(file), table.to_csv(index=not is_plain_index(table)))
        entry = {"file": file, "rows": len(table), "columns": list(map(str, table.columns))}
        self.put_into("tables", name, entry | _given(caption=table.attrs.get("caption")))

    def figure(self, name: str, png: bytes, **facts: Any) -> None:
        """Keep ``png`` as ``figures/<name>.png``; facts: ``finding``, ``caption``, ``cover``."""
        file = f"figures/{_file_name(name)}.png"
        if self.folder is not None:
            with new_file(self._place(file), wanted=len(png)) as partial:
                partial.write_bytes(png)
        self.put_into("figures", name, {"file": file} | _given(**facts))

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
    raise MoeeError(
        "numbers, text, lists and mappings to record", f"a {type(value).__name__}",
        "record the numbers inside it, or keep it as a table or a figure",
    )  # fmt: skip


def picture(fig: Figure) -> bytes:
    """``fig`` as PNG at the resolution of the house style, without date or version."""
    buffer = io.BytesIO()
    options = {"bbox_inches": "tight", "facecolor": "white", "metadata": {"Software": None}}
    fig.savefig(buffer, format="png", dpi=fig.dpi, **options)
    return buffer.getvalue()


def alternative(figure: Mapping[str, Any]) -> str:
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


def _given(**facts: Any) -> dict[str, Any]:
    return {name: fact for name, fact in facts.items() if fact}


def _file_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        hint = "choose a short name: a file is called by it"
        raise MoeeError("a name of letters, digits, '_' and '-'", repr(name), hint)
    return name
