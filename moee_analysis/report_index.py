"""The index of a report: one card per notebook, and the facts of the run."""

from __future__ import annotations

import io
import json
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from moee_analysis import environment
from moee_analysis.report_html import document
from moee_analysis.report_page import PAGE, data_uri
from moee_analysis.report_worker import STATUS
from moee_analysis.results import FILE, readable

INDEX = "index.html"
COVER_PIXELS = (760, 760)
STATUSES = {
    "ok": '<span class="good">✓ ran</span>',
    "cell_error": '<span class="bad">✗ a cell failed</span>',
    "timeout": '<span class="bad">✗ stopped: too slow</span>',
    "dead_kernel": '<span class="bad">✗ its kernel died</span>',
}
CLAIM_MARKS = {
    True: '<span class="good" title="{0}">●</span>',
    False: '<span class="bad" title="{0}">○</span>',
    None: '<span class="half" title="{0}">◐</span>',
}


def write_index(out: Path, folders: list[Path]) -> None:
    """Write ``index.html`` for the notebook runs in ``folders``, atomically."""
    runs = [_read(folder) for folder in folders]
    cards = "\n".join(_card(folder, *run) for folder, run in zip(folders, runs, strict=True))
    body = f"""<div class="index">
<header>
<p class="kicker">moee_analysis · report</p>
<h1>A vision network, taken apart into experts</h1>
<p class="summary">{_summary(runs)}{_warning(runs)}</p>
<dl class="facts">{_facts([found for _, found in runs if found])}</dl>
</header>
<main class="cards{" pairs" if len(runs) in (2, 4) else ""}">
{cards}
</main>
{_versions()}
</div>"""
    partial = out / f".{INDEX}"
    partial.write_text(document("moee_analysis report", body), encoding="utf-8")
    partial.replace(out / INDEX)


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
    """Model, images, preset, seed and date as a definition list."""
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
        "Made": datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
    }
    told = {name: value for name, value in rows.items() if value is not None}
    return "".join(
        f"<div><dt>{name}</dt><dd>{escape(str(value))}</dd></div>" for name, value in told.items()
    )


def _card(folder: Path, status: dict[str, Any], found: dict[str, Any]) -> str:
    """One notebook: cover, title, summary, key number, claims, status and seconds."""
    ending = STATUSES[status["status"]]
    return f"""<article class="card">
{_cover(folder, found)}
<div class="text">
<h2><a href="{escape(folder.name)}/{PAGE}">{escape(status["title"])}</a></h2>
<p>{escape(status["summary"])}</p>
<div class="found">
{_headline(found)}{_error(status)}
<footer><span>{ending} · {status["seconds"]:.0f} s</span>{_claims(found)}</footer>
</div>
</div>
</article>"""


def _cover(folder: Path, found: dict[str, Any]) -> str:
    """The cover figure, else the first one, small enough to carry."""
    figures = list(found.get("figures", {}).values())
    chosen = next((f for f in figures if f.get("cover")), figures[0] if figures else None)
    if chosen is None:
        return '<div class="cover">no figure</div>'
    alt = escape(chosen.get("caption", ""))
    return f'<img class="cover" src="{_thumbnail(folder / chosen["file"])}" alt="{alt}">'


def _thumbnail(path: Path) -> str:
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as image:
        small = image.convert("RGB")
        small.thumbnail(COVER_PIXELS)
        small.save(buffer, format="WEBP", quality=88)
    return data_uri(buffer.getvalue(), "webp")


def _headline(found: dict[str, Any]) -> str:
    headline = found.get("headline")
    if headline is None:
        return ""
    value, label = escape(readable(headline["value"])), escape(headline["label"])
    return f'<p class="headline"><b>{value}</b><span>{label}</span></p>'


def _error(status: dict[str, Any]) -> str:
    return f'<p class="error">{escape(status["error"])}</p>' if status.get("error") else ""


def _claims(found: dict[str, Any]) -> str:
    """One mark per claim; its words appear under the pointer."""
    claims = found.get("claims", [])
    if not claims:
        return ""
    marks = " ".join(
        CLAIM_MARKS[c["holds"]].format(escape(f"{c['statement']} {c['verdict']}")) for c in claims
    )
    return f'<span aria-label="claims">claims {marks}</span>'


def _versions() -> str:
    rows = "".join(f"<li>{escape(k)} {escape(v)}</li>" for k, v in environment.versions().items())
    details = f"<details><summary>Versions</summary><ul>{rows}</ul></details>"
    return f'<footer class="fine">{details}</footer>'
