"""What has changed since an earlier report: key numbers side by side, and verdicts."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from moee_analysis.report.notebook.bench import VERDICTS
from moee_analysis.report.notebook.results import readable
from moee_analysis.report.summary.names import HEADLINE, RETENTION
from moee_analysis.report.summary.summary import is_plain

Summary = Mapping[str, Any]
WHERE = ("preset", "seed")


def compare(old: Summary, new: Summary, *, waiting: Collection[str] = ()) -> dict[str, Any]:
    """Tables of two summaries, the notebooks of earlier reports in ``new`` left out.

    - ``numbers``: ``notebook``, ``number``, ``old``, ``new`` and ``change`` of those with plain
      names that both have;
    - ``verdicts``: ``notebook``, ``statement``, ``old`` and ``new`` of claims that both make, where
      they differ; ``same`` is how many do not;
    - ``missing``: in words, notebooks that only one of them has, those ``waiting`` left out;
    - ``settings``: in words, preset and seed, where they differ.
    """
    before = old["notebooks"]
    after = {name: each for name, each in new["notebooks"].items() if not each["earlier"]}
    both = [name for name in after if name in before]
    claims = [row for name in both for row in _claims(name, before[name], after[name])]
    gone = [
        f"{name}: only in the earlier report" for name in before if name not in {*after, *waiting}
    ]
    come = [f"{name}: only in this report" for name in after if name not in before]
    return {
        "numbers": [row for name in both for row in _numbers(name, before[name], after[name])],
        "verdicts": [row for row in claims if row["old"] != row["new"]],
        "same": sum(row["old"] == row["new"] for row in claims),
        "missing": gone + come,
        "settings": [
            f"{fact} {old.get(fact)} before, {new.get(fact)} now"
            for fact in WHERE
            if old.get(fact) != new.get(fact)
        ],
    }


def _numbers(name: str, old: Summary, new: Summary) -> Iterator[dict[str, Any]]:
    before, after = old["values"], new["values"]
    for number in after:
        first = number == HEADLINE and RETENTION not in after
        if number in before and (first or is_plain(number)):
            change = after[number] - before[number]
            values = {"old": before[number], "new": after[number], "change": change}
            yield {"notebook": name, "number": number, **values}


def _claims(name: str, old: Summary, new: Summary) -> Iterator[dict[str, Any]]:
    before = {claim["statement"]: claim["verdict"] for claim in old["claims"]}
    for claim in new["claims"]:
        if claim["statement"] in before:
            verdicts = {"old": before[claim["statement"]], "new": claim["verdict"]}
            yield {"notebook": name, "statement": claim["statement"], **verdicts}


def verdict_text(row: Summary) -> str:
    """How a verdict has changed, in words."""
    return f"{VERDICTS[row['old']][0]} → {VERDICTS[row['new']][0]}"


def comparison_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A comparison for the terminal, changed verdicts first."""
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
