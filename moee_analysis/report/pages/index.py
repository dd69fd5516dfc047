"""The index of a report: one card per notebook, and the facts of the run."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from moee_analysis.outside_text import printable
from moee_analysis.report.pages.card import card
from moee_analysis.report.pages.html import document
from moee_analysis.report.results import FILE, readable
from moee_analysis.report.runner.worker import STATUS
from moee_analysis.utils import versions as environment
from moee_analysis.utils.storage.files import write_text

INDEX = "index.html"


def write_index(out: Path, folders: list[Path]) -> None:
    """Write ``index.html`` for the notebook runs in ``folders``, atomically."""
    runs = [_read(folder) for folder in folders]
    cards = "\n".join(card(folder, *run) for folder, run in zip(folders, runs, strict=True))
    body = f"""<div class="index">
<header>
<p class="kicker">moee_analysis · report</p>
<h1>A vision network, taken apart into experts</h1>
<p class="summary">{_summary(runs)}{_warning(runs)}</p>
{_facts([found for _, found in runs if found])}
</header>
<main class="cards{" pairs" if len(runs) in (2, 4) else ""}">
{cards}
</main>
{_environment(runs)}
</div>"""
    write_text(out / INDEX, document("moee_analysis report", body))


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Status and results of a run; the results are empty if it kept none."""
    found = folder / FILE
    results = json.loads(found.read_text(encoding="utf-8")) if found.is_file() else {}
    return json.loads((folder / STATUS).read_text(encoding="utf-8")), results


def _summary(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """How many notebooks ran, and how many claims of the paper hold, in words."""
    ran = sum(status["status"] == "ok" for status, _ in runs)
    first = f"{ran} of {len(runs)} notebooks ran to their end."
    if ran == len(runs):
        first = (
            f"All {ran} notebooks ran to their end." if ran > 1 else "The notebook ran to its end."
        )
    every = [claim for _, found in runs for claim in found.get("claims", [])]
    claims = [claim["holds"] for claim in every if not claim.get("ours")]
    if not claims:
        return first
    hold, half = claims.count(True), claims.count(None)
    verb = "holds" if hold == 1 else "hold"
    partly = f", {half} in part" if half else ""
    return f"{first} Of {len(claims)} claims of the paper, {hold} {verb} here{partly}."


def _warning(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    smoke = any(found.get("parameters", {}).get("preset") == "smoke" for _, found in runs)
    return " Preset smoke only shows that everything runs: its numbers are no findings." * smoke


def _facts(found: list[dict[str, Any]]) -> str:
    """Model, images, preset and seed as a definition list."""
    facts: dict[str, Any] = {}
    for results in reversed(found):
        images = results.get("images", {}).get("evaluation")
        facts |= results.get("parameters", {})
        facts |= {"shown": f"{images['name']} ({readable(images['count'])})"} if images else {}
    rows = {
        "Model": facts.get("model"),
        "Weights": Path(facts["weights"]).name if facts.get("weights") else None,
        "Images": facts.get("shown") or facts.get("images"),
        "Preset": facts.get("preset"),
        "Seed": facts.get("seed"),
    }
    return _definitions(rows)


def _environment(runs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Where and when the numbers were made, as the page's footer; all versions behind a fold."""
    known = [found["environment"] for _, found in runs if "environment" in found]
    last = known[-1] if known else {}
    versions = last.get("versions") or environment.versions()
    finished = datetime.fromisoformat(last["finished"]) if last else datetime.now(UTC)
    device = last.get("device", "unknown")
    rows = {
        "Device": device,
        "CPU cores": None if "cores" in device else last.get("cores"),
        "PyTorch": versions["torch"],
        "Time": _duration(sum(status["seconds"] for status, _ in runs)),
        "Date": finished.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
    every = "".join(f"<li>{escape(k)} {escape(v)}</li>" for k, v in versions.items())
    return f"""<footer class="fine">
{_definitions(rows)}
<details><summary>All versions</summary><ul>{every}</ul></details>
</footer>"""


def _definitions(rows: dict[str, Any]) -> str:
    """What is known of ``rows`` as a definition list."""
    told = "".join(
        f"<div><dt>{name}</dt><dd>{escape(printable(str(value)))}</dd></div>"
        for name, value in rows.items()
        if value is not None
    )
    return f'<dl class="facts">{told}</dl>'


def _duration(seconds: float) -> str:
    """``seconds`` as hours, minutes and seconds, the two largest of them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
