"""``summary.json``: what every notebook of a report has come to, and what has changed since."""

from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.report.notebook.bench import VERDICTS
from moee_analysis.report.notebook.results import FILE, STATUS, read, readable
from moee_analysis.report.summary.gates import HEADLINE, KEPT, RETENTION, SUMMARY, gate_text
from moee_analysis.utils.environment import version
from moee_analysis.utils.storage.files import read_json

SCHEMA = 1  # raise it where a program that reads the file would go wrong
SETTINGS = ("preset", "seed", "model", "weights", "images")  # a comparison names those that differ

Summary = Mapping[str, Any]


def summarize(
    runs: Iterable[Path], parameters: Mapping[str, Any], *, earlier: Collection[Path] = ()
) -> dict[str, Any]:
    """The summary of the notebook ``runs``, some of which are of an ``earlier`` report.

    ``numbers`` are those with a plain name: of several notebooks the last one's, by its name.
    """
    notebooks = {run.name: _notebook(run) | {"earlier": run in earlier} for run in sorted(runs)}
    own = [found for found in notebooks.values() if not found["earlier"]]
    named = ChainMap(*(found["values"] for found in reversed(own)))
    first = ChainMap(*({k: v for k, v in found.items() if v is not None} for found in own))
    return {
        "schema": SCHEMA, "version": version(),
        **{fact: parameters.get(fact, first.get(fact)) for fact in SETTINGS},
        "numbers": {name: named[name] for name in sorted(named) if is_plain(name)},
        "notebooks": notebooks,
    }  # fmt: skip


def is_plain(name: str) -> bool:
    """Whether a number says something beside other reports, or of a whole one."""
    return "." not in name and name != HEADLINE


def _notebook(folder: Path) -> dict[str, Any]:
    status, found = read(folder / STATUS), read(folder / FILE)
    given, claims = found.get("parameters", {}), found.get("claims", [])
    return {
        "status": status["status"], "seconds": status["seconds"], "error": status.get("error"),
        **{fact: given.get(fact) for fact in SETTINGS}, "headline": found.get("headline"),
        "claims": [{"statement": each["statement"], "verdict": each["holds"]} for each in claims],
        "values": numbers_of(found),
    }  # fmt: skip


def numbers_of(found: Mapping[str, Any]) -> dict[str, float]:
    """All numbers that a notebook has recorded, by their names, joined by dots where nested.

    ``headline`` is the number of its headline; where that is what is kept of the dense top-1, it
    is the ``retention`` too.
    """
    numbers = dict(_leaves("", found.get("values", {})))
    headline = found.get("headline") or {}
    if "number" in headline:
        kept = [RETENTION] if headline["label"].startswith(KEPT) else []
        numbers |= dict.fromkeys([HEADLINE, *kept], headline["number"])
    return numbers


def _leaves(name: str, value: Any) -> Iterable[tuple[str, float]]:
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(f"{name}.{key}" if name else str(key), item)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield name, value


def read_summary(place: Path) -> dict[str, Any]:
    """The summary in a report's folder, or in a file; anything else is refused."""
    path, hint = place / SUMMARY if place.is_dir() else place, "name a report's folder"
    expected = f"the {SUMMARY} of an earlier report"
    summary = read_json(path, expected=expected, hint=hint)
    try:
        schema = summary["schema"]
        if schema != SCHEMA:
            raise MoeeError(f"{expected} of schema {SCHEMA}", str(schema), "make it again")
        for each in summary["notebooks"].values():
            list(map(float, each["values"].values()))
            [(claim["statement"], claim["verdict"]) for claim in each["claims"]]
            each["status"], each["earlier"]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise MoeeError(expected, f"another content of '{path}' ({error!r})", hint) from None
    return summary


def compare(old: Summary, new: Summary, *, waiting: Collection[str] = ()) -> dict[str, Any]:
    """Tables of two summaries, the notebooks of earlier reports in ``new`` left out.

    - ``numbers``: ``notebook``, ``number``, ``old``, ``new`` and ``change`` of those with plain
      names that both have;
    - ``verdicts``: ``notebook``, ``statement``, ``old`` and ``new`` of claims that both make, where
      they differ; ``same`` is how many do not;
    - ``missing``: in words, notebooks that only one of them has, those ``waiting`` left out;
    - ``settings``: in words, those of :data:`SETTINGS` that differ.
    """
    before = old["notebooks"]
    after = {name: each for name, each in new["notebooks"].items() if not each["earlier"]}
    both = [name for name in after if name in before]
    claims = [row for name in both for row in _claims(name, before[name], after[name])]
    known = {*after, *waiting}
    gone = [f"{name}: only in the earlier report" for name in before if name not in known]
    come = [f"{name}: only in this report" for name in after if name not in before]
    changed = [fact for fact in SETTINGS if fact in old and old[fact] != new.get(fact)]
    return {
        "numbers": [row for name in both for row in _numbers(name, before[name], after[name])],
        "verdicts": [row for row in claims if row["old"] != row["new"]],
        "same": sum(row["old"] == row["new"] for row in claims),
        "missing": gone + come,
        "settings": [f"{fact} {old.get(fact)} before, {new.get(fact)} now" for fact in changed],
    }


def _numbers(name: str, old: Summary, new: Summary) -> Iterator[dict[str, Any]]:
    before, after = old["values"], new["values"]
    for number in after:
        first = number == HEADLINE and RETENTION not in after
        if number in before and (first or is_plain(number)):
            values = {"old": before[number], "new": after[number]}
            change = after[number] - before[number]
            yield {"notebook": name, "number": number, **values, "change": change}


def _claims(name: str, old: Summary, new: Summary) -> Iterator[dict[str, Any]]:
    before = {claim["statement"]: claim["verdict"] for claim in old["claims"]}
    for claim in new["claims"]:
        if claim["statement"] in before:
            verdicts = {"old": before[claim["statement"]], "new": claim["verdict"]}
            yield {"notebook": name, "statement": claim["statement"], **verdicts}


def verdict_text(row: Summary) -> str:
    """How a verdict has changed, in words."""
    return f"{VERDICTS[row['old']][0]} → {VERDICTS[row['new']][0]}"


def summary_lines(summary: Summary) -> Iterator[str]:
    """What came of gates and comparison, changed verdicts first, for the terminal."""
    yield from map(gate_text, summary["gates"])
    found = summary["against"]
    if not found:
        return
    yield f"against the earlier report: {verdicts_line(found)}"
    for row in found["verdicts"]:
        yield f"! {row['notebook']}: {verdict_text(row)}: {row['statement']}"
    for row in found["numbers"]:
        values = f"{readable(row['old'])} → {readable(row['new'])}"
        yield f"  {row['notebook']} {row['number']}: {values} ({row['change']:+.3g})"
    yield from (f"  {line}" for line in found["settings"] + found["missing"])


def verdicts_line(found: Mapping[str, Any]) -> str:
    """How many verdicts have changed, in words."""
    changed = len(found["verdicts"])
    return f"{changed} verdict{'' if changed == 1 else 's'} changed, {found['same']} did not"
