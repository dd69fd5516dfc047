"""The index of a report: one card per notebook, and the facts of the run."""

import io
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image

from moee_analysis.report.notebook.results import FILE, STATUS, alternative, readable
from moee_analysis.report.pages.page import PAGE
from moee_analysis.report.pages.templates import data_uri, render
from moee_analysis.utils.environment import versions
from moee_analysis.utils.storage.files import write_text

INDEX = "index.html"
COVER_PIXELS = (760, 760)


def write_index(out: Path, folders: list[Path]) -> None:
    """Write ``index.html`` for the notebook runs in ``folders``, atomically."""
    statuses = [_read(folder / STATUS) for folder in folders]
    results = [_read(folder / FILE) for folder in folders]
    claims = [claim for found in results for claim in found.get("claims", [])]
    environment = ([{}] + [found["environment"] for found in results if "environment" in found])[-1]
    environment = {"versions": versions()} | environment
    page = render(
        "pages/index.html",
        title="moee_analysis report",
        verdicts=[claim["holds"] for claim in claims if not claim.get("ours")],
        smoke=any(found.get("parameters", {}).get("preset") == "smoke" for found in results),
        facts=_facts(results),
        cards=list(map(_card, folders, statuses, results)),
        versions=environment["versions"],
        machine=_machine(environment, sum(status["seconds"] for status in statuses)),
    )
    write_text(out / INDEX, page)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _card(folder: Path, status: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Cover, title, summary, key number beside the dense model's, claims and ending."""
    return status | {
        "page": f"{folder.name}/{PAGE}",
        "cover": _cover(folder, list(found.get("figures", {}).values())),
        "headline": found.get("headline"),
        "claims": found.get("claims", []),
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


def _machine(environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Where and when the numbers were made."""
    finished = environment.get("finished")
    date = datetime.fromisoformat(finished) if finished else datetime.now(UTC)
    device = environment.get("device", "unknown")
    return {
        "Device": device,
        "CPU cores": None if "cores" in device else environment.get("cores"),
        "PyTorch": environment["versions"]["torch"],
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
