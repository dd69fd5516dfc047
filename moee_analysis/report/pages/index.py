"""The index of a report: one card per notebook, and the facts of the run."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from moee_analysis.report.notebook.results import FILE, STATUS, alternative, readable
from moee_analysis.report.pages.page import PAGE
from moee_analysis.report.pages.templates import data_uri, render
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.versions import versions

INDEX = "index.html"
COVER_PIXELS = (760, 760)
ENDINGS = {
    "ok": "✓ ran",
    "cell_error": "✗ a cell failed",
    "timeout": "✗ stopped: too slow",
    "dead_kernel": "✗ its kernel died",
}
TALLIES = {
    True: ("good", "✓ {} holds", "✓ {} hold"),
    None: ("half", "◐ {} holds in part", "◐ {} hold in part"),
    False: ("bad", "✗ {} does not", "✗ {} do not"),
}

Run = tuple[dict[str, Any], dict[str, Any]]
"""Status and results of a notebook; the results are empty if it kept none."""


def write_index(out: Path, folders: list[Path]) -> None:
    """Write ``index.html`` for the notebook runs in ``folders``, atomically."""
    runs = [(_read(folder / STATUS), _read(folder / FILE)) for folder in folders]
    environments = [found["environment"] for _, found in runs if "environment" in found]
    last = environments[-1] if environments else {}
    known = last.get("versions") or versions()
    page = render(
        "pages/index.html",
        title="moee_analysis report",
        summary=_summary(runs) + _warning(runs),
        facts=_facts([found for _, found in runs if found]),
        cards=[_card(folder, *run) for folder, run in zip(folders, runs, strict=True)],
        versions=known,
        machine=_machine(last, known["torch"], sum(status["seconds"] for status, _ in runs)),
    )
    write_text(out / INDEX, page)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _card(folder: Path, status: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Cover, title, summary, key number beside the dense model's, claims and ending."""
    claims = [claim | {"colour": TALLIES[claim["holds"]][0]} for claim in found.get("claims", [])]
    verdicts = [claim["holds"] for claim in claims]
    tallies = [
        (colour, (one if verdicts.count(holds) == 1 else several).format(verdicts.count(holds)))
        for holds, (colour, one, several) in TALLIES.items()
        if holds in verdicts
    ]
    return status | {
        "page": f"{folder.name}/{PAGE}",
        "cover": _cover(folder, list(found.get("figures", {}).values())),
        "headline": found.get("headline"),
        "claims": claims,
        "tallies": tallies,
        "ending": ENDINGS[status["status"]],
    }


def _cover(folder: Path, figures: list[dict[str, Any]]) -> dict[str, str] | None:
    """The cover figure, else the first one, small enough to carry."""
    chosen = next((figure for figure in figures if figure.get("cover")), (figures or [None])[0])
    if chosen is None:
        return None
    buffer = io.BytesIO()
    with Image.open(folder / chosen["file"]) as image:
        small = image.convert("RGB")
        small.thumbnail(COVER_PIXELS)
        small.save(buffer, format="WEBP", quality=88)
    return {"picture": data_uri(buffer.getvalue(), "webp"), "alt": alternative(chosen)}


def _summary(runs: list[Run]) -> str:
    """How many notebooks ran, and how many claims of the paper hold, in words."""
    ran, total = sum(status["status"] == "ok" for status, _ in runs), len(runs)
    first = f"{ran} of {total} notebooks ran to their end."
    if ran == total:
        first = (
            f"All {ran} notebooks ran to their end." if ran > 1 else "The notebook ran to its end."
        )
    claims = [claim for _, found in runs for claim in found.get("claims", [])]
    verdicts = [claim["holds"] for claim in claims if not claim.get("ours")]
    if not verdicts:
        return first
    hold, half = verdicts.count(True), verdicts.count(None)
    verb = "holds" if hold == 1 else "hold"
    partly = f", {half} in part" if half else ""
    return f"{first} Of {len(verdicts)} claims of the paper, {hold} {verb} here{partly}."


def _warning(runs: list[Run]) -> str:
    smoke = any(found.get("parameters", {}).get("preset") == "smoke" for _, found in runs)
    return " Preset smoke only shows that everything runs: its numbers are no findings." * smoke


def _facts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Model, images, preset and seed; the first notebook's, where they differ."""
    facts: dict[str, Any] = {}
    for results in reversed(found):
        facts |= results.get("parameters", {})
        images = results.get("images", {}).get("evaluation")
        facts |= {"shown": f"{images['name']} ({readable(images['count'])})"} if images else {}
    return {
        "Model": facts.get("model"),
        "Weights": Path(facts["weights"]).name if facts.get("weights") else None,
        "Images": facts.get("shown") or facts.get("images"),
        "Preset": facts.get("preset"),
        "Seed": facts.get("seed"),
    }


def _machine(environment: dict[str, Any], torch: str, seconds: float) -> dict[str, Any]:
    """Where and when the numbers were made."""
    finished = environment.get("finished")
    date = datetime.fromisoformat(finished) if finished else datetime.now(UTC)
    device = environment.get("device", "unknown")
    return {
        "Device": device,
        "CPU cores": None if "cores" in device else environment.get("cores"),
        "PyTorch": torch,
        "Time": _duration(seconds),
        "Date": date.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _duration(seconds: float) -> str:
    """``seconds`` as hours, minutes and seconds, the two largest of them."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
