"""``summary.json``: what every notebook of a report has come to, for programs to read."""

import json
import re
from collections import ChainMap
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.report.notebook.results import FILE, STATUS
from moee_analysis.report.summary.names import HEADLINE, KEPT, RETENTION, SUMMARY
from moee_analysis.utils.environment import version
from moee_analysis.utils.storage.files import read_json

SCHEMA = 1  # raise it where a program that reads the file would go wrong
NUMBER = re.compile(r"([+-]?\d+(?:\.\d+)?) ?(%?)")


def summarize(
    runs: Iterable[Path], parameters: Mapping[str, Any], *, earlier: Collection[Path] = ()
) -> dict[str, Any]:
    """The summary of the notebook ``runs``, some of which are of an ``earlier`` report.

    ``numbers`` are those with a plain name: of several notebooks the last one's, by its name.
    """
    folders = sorted(runs)
    notebooks = {
        folder.name: _notebook(folder) | {"earlier": folder in earlier} for folder in folders
    }
    own = [found for found in notebooks.values() if not found["earlier"]]
    named = ChainMap(*(found["values"] for found in reversed(own)))
    seeds = (found["seed"] for found in own if found["seed"] is not None)
    return {
        "schema": SCHEMA, "version": version(),
        "preset": parameters.get("preset"), "seed": parameters.get("seed", next(seeds, None)),
        "numbers": {name: named[name] for name in sorted(named) if is_plain(name)},
        "notebooks": notebooks,
    }  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether a number says something beside other reports, or of a whole one."""
    return "." not in name and name != HEADLINE


def _notebook(folder: Path) -> dict[str, Any]:
    status, path = json.loads((folder / STATUS).read_text(encoding="utf-8")), folder / FILE
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    given, claims = found.get("parameters", {}), found.get("claims", [])
    return {
        "status": status["status"], "seconds": status["seconds"], "error": status.get("error"),
        "preset": given.get("preset"), "seed": given.get("seed"),
        "headline": found.get("headline"),
        "claims": [{"statement": each["statement"], "verdict": each["holds"]} for each in claims],
        "values": numbers_of(found),
    }  # fmt: skip


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """All numbers that a notebook has recorded, by their names, joined by dots where nested.

    ``headline`` is the number that its headline begins with, a percentage as a share; where that
    is what is kept of the dense top-1, it is the ``retention`` too.
    """
    numbers = dict(_leaves("", found.get("values", {})))
    headline = found.get("headline") or {}
    read = NUMBER.match(str(headline.get("value")).replace("−", "-"))
    if read:
        numbers[HEADLINE] = float(read[1]) / 100 if read[2] else float(read[1])
        if headline["label"].startswith(KEPT):
            numbers[RETENTION] = numbers[HEADLINE]
    return numbers


def _leaves(name: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, (dict, list)):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in pairs:
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def read_summary(place: Path) -> dict[str, Any]:
    """The summary in a report's folder, or in a file; anything else is refused."""
    path, hint = place / SUMMARY if place.is_dir() else place, "name a report's folder"
    expected = f"the {SUMMARY} of an earlier report"
    summary = read_json(path, expected=expected, hint=hint)
    try:
        if summary["schema"] != SCHEMA:
            raise MoeeError(
                f"{expected} of schema {SCHEMA}", str(summary["schema"]), "make it again"
            )
        for each in summary["notebooks"].values():
            list(map(float, each["values"].values()))
            [(claim["statement"], claim["verdict"]) for claim in each["claims"]]
            each["status"], each["earlier"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MoeeError(expected, f"another content of '{path}' ({error!r})", hint) from None
    return summary


def gates_met(out: Path) -> bool:
    """Whether the report in the folder ``out`` has reached all that was asked of it."""
    return all(gate["met"] for gate in read_summary(out)["gates"])
