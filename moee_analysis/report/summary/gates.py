"""Gates: numbers that a report must reach, as ``retention=0.95`` or ``08.retention=0.95``."""

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError

SUMMARY = "summary.json"
HEADLINE, RETENTION = "headline", "retention"  # numbers that are read from a notebook's headline
KEPT = "of the dense top-1 kept"  # so begins the label of a headline that is a retention
CALL = re.compile(r"""\.(record|headline)\(\s*(?:f?["']([^"'{]*))?""")
"""What keeps a number, in a cell, and the words that its name or its label begins with."""


@dataclass(frozen=True)
class Gate:
    """A number by its ``name``, perhaps after a notebook's and a dot, and the ``least`` it may be.

    Where several notebooks have the number, it is that of the last one by name.
    """

    name: str
    least: float

    def key(self, notebook: str) -> str | None:
        """The number's name in a notebook; None where another notebook is meant."""
        before, _, rest = self.name.partition(".")
        if rest and (before == notebook or before.isdigit()):
            number = notebook.partition("_")[0].lstrip("0")
            return rest if before == notebook or before.lstrip("0") == number else None
        return self.name

    def judge(self, notebooks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        """Whether a summary's ``notebooks`` meet the gate, what was ``found``, and in which."""
        values = {name: each["values"] for name, each in notebooks.items() if not each["earlier"]}
        by = max((name for name, own in values.items() if self.key(name) in own), default=None)
        found = None if by is None else values[by][self.key(by)]
        met = found is not None and found >= self.least
        return asdict(self) | {"notebook": by, "found": found, "met": met}


def gate_text(gate: Mapping[str, Any]) -> str:
    """A gate that was judged, in words."""
    found = "no such number" if gate["found"] is None else f"{gate['found']:.6g}"
    by = f" of {gate['notebook']}" if gate["notebook"] else ""
    words = f"{gate['name']}{by}: {found}, at least {gate['least']:g} is wanted"
    return f"{'✓' if gate['met'] else '✗'} gate {words}"


def read_gate(text: str) -> Gate:
    """The gate that is written ``NAME=NUMBER``."""
    name, _, least = text.rpartition("=")
    with suppress(ValueError):
        if name.strip() and name.isprintable() and math.isfinite(float(least)):
            return Gate(name.strip(), float(least))
    raise MoeeError("NAME=NUMBER, such as retention=0.95", repr(text), "correct it")


def check_gates(gates: Iterable[Gate], notebooks: Sequence[Path]) -> None:
    """Refuse gates for numbers that none of the notebooks records, by the words in their cells."""
    known = {path.stem: set(recorded(path)) for path in notebooks}
    for gate in gates:
        if not any((gate.key(name) or "").partition(".")[0] in own for name, own in known.items()):
            listed = [f"{name}: {', '.join(sorted(of))}" for name, of in known.items() if of]
            expected = f"a number of these notebooks ({'; '.join(listed) or 'they record none'})"
            raise MoeeError(expected, repr(gate.name), "name one of them, or run its notebook too")


def recorded(notebook: Path) -> Iterator[str]:
    """Names under which a notebook records numbers, before any dot."""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        calls = CALL.findall("".join(cell["source"])) if cell["cell_type"] == "code" else []
        for method, words in calls:
            of_headline = [HEADLINE, RETENTION] if words.startswith(KEPT) else [HEADLINE]
            yield from of_headline if method == "headline" else [words]
