"""A report's pages, from the templates beside: escaped, fetching nothing; index and notebooks."""

import os
import re
from collections import ChainMap
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader
from PIL import Image

from moee_analysis.outside_text import printable
from moee_analysis.report.notebook.results import FILE, NOTEBOOK, STATUS, alt_text, read, readable
from moee_analysis.report.pages.body import notebook_body
from moee_analysis.report.pages.output import abridge
from moee_analysis.report.pictures import data_uri, shrink
from moee_analysis.report.summary.gates import gate_text
from moee_analysis.report.summary.summary import verdict_text, verdicts_line
from moee_analysis.utils.environment import versions
from moee_analysis.utils.storage.files import write_text

INDEX, PAGE, LOG = "index.html", "page.html", "log.txt"
LOG_LINES = 40
COVER_PIXELS = 760  # of the longer side
TEMPLATES = Environment(
    loader=PackageLoader("moee_analysis", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
WORDS = (readable, alt_text, gate_text, verdict_text, verdicts_line)
TEMPLATES.filters |= {each.__name__: each for each in WORDS} | {
    "printable": lambda value: printable(str(value)),
    "address": lambda path: quote(os.fsencode(path)),  # of a file, whatever it is called
}


def render(name: str, **facts: Any) -> str:
    """Fill the template ``name``, a path below the room ``report``, with ``facts``."""
    return TEMPLATES.get_template(name).render(facts)


def write_page(folder: Path, status: Mapping[str, Any]) -> None:
    """Write ``page.html`` of a notebook run into its ``folder``.

    After a timeout or a dead kernel there is no notebook: it tells what happened, and shows the
    figures that were kept before.
    """
    figures = list(read(folder / FILE).get("figures", {}).values())
    tables = sorted(path.relative_to(folder).as_posix() for path in folder.glob("tables/*.csv"))
    files = [*(name for name in (FILE, NOTEBOOK) if (folder / name).is_file()), *tables]
    facts: dict[str, Any] = {"files": files}
    if (folder / NOTEBOOK).is_file():
        findings = {alt_text(f): f["finding"] for f in figures if f.get("finding")}
        facts["notebook"] = notebook_body(folder / NOTEBOOK, findings)
    else:
        facts["figures"] = [
            figure | {"picture": data_uri((folder / figure["file"]).read_bytes())}
            for figure in figures
        ]
        log = folder / LOG
        lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
        facts["log"] = abridge("\n".join(map(printable, lines[-LOG_LINES:])))
    (folder / PAGE).write_text(render("pages/page.html", **status, **facts), encoding="utf-8")


def read_story(notebook: Path) -> dict[str, str]:
    """``title`` and ``summary`` of a notebook: its first heading and the paragraph after it."""
    texts = ("".join(c["source"]) for c in read(notebook)["cells"] if c["cell_type"] == "markdown")
    blocks = [block.strip() for block in next(texts, "").split("\n\n")]
    heading = next((b for b in blocks if b.startswith("# ")), "")
    title, _, rest = heading.removeprefix("# ").partition("\n")
    prose = [rest, *blocks] if rest else blocks
    summary = next((b for b in prose if b and not b.startswith(("#", "|", "<", "!"))), "")
    summary = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", summary)  # links by their words
    summary = re.sub(r"[*`_]{1,2}(\S(?:.*?\S)?)[*`_]{1,2}", r"\1", summary)  # no emphasis
    title = title or notebook.stem.replace("_", " ")
    return {"title": printable(title), "summary": printable(" ".join(summary.split()))}


def write_index(out: Path, folders: list[Path], waiting: Mapping, summary: Mapping) -> None:
    """Write ``index.html``: a card for each run in ``folders``, and those of an earlier report.

    It names notebooks that are ``waiting`` or running, and gates and comparison of the ``summary``.
    """
    earlier = runs_of(out) - set(folders)
    runs = {run: read(run / FILE) for run in sorted({*folders, *earlier})}
    cards = [
        read(run / STATUS)
        | {"page": f"{run.name}/{PAGE}", "cover": _cover(run, found), "earlier": run in earlier}
        | {"headline": found.get("headline"), "claims": found.get("claims", [])}
        for run, found in runs.items()
    ]
    claims = [claim for card in cards for claim in card["claims"]]
    results, environment = list(runs.values()), {"versions": versions()}
    for found in results:
        environment |= found.get("environment", {})
    page = render(
        "pages/index.html",
        title="moee_analysis report",
        verdicts=[claim["holds"] for claim in claims if not claim.get("ours")],
        smoke=any(found.get("parameters", {}).get("preset") == "smoke" for found in results),
        facts=_facts(results),
        cards=cards,
        waiting=waiting,
        summary=summary,
        versions=environment["versions"],
        machine=_machine(environment, sum(card["seconds"] for card in cards)),
    )
    write_text(out / INDEX, page)


def runs_of(out: Path) -> set[Path]:
    """Folders of all notebook runs in a report's folder, of this report or an earlier one."""
    told = {"status", "seconds", "title", "summary"}
    runs = {path.parent for path in out.glob(f"[!.]*/{STATUS}") if told <= read(path).keys()}
    return {run for run in runs if (run / PAGE).is_file()}


def _cover(folder: Path, found: dict[str, Any]) -> dict[str, str] | None:
    """The cover figure, else the first one, small enough to carry."""
    figures = found.get("figures", {}).values()
    if not figures:
        return None
    chosen = max(figures, key=lambda figure: bool(figure.get("cover")))
    with Image.open(folder / chosen["file"]) as image:
        small = shrink(image.convert("RGB"), COVER_PIXELS, format="WEBP", quality=88)
    return {"picture": data_uri(small, "webp"), "alt": alt_text(chosen)}


def _facts(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Model, images, preset and seed; the first notebook's, where they differ."""
    facts = ChainMap(*(results.get("parameters", {}) for results in found))
    seen = next((results["images"]["evaluation"] for results in found if "images" in results), None)
    return {
        "Model": facts.get("model"),
        "Weights": Path(facts["weights"]).name if facts.get("weights") else None,
        "Images": f"{seen['name']} ({readable(seen['count'])})" if seen else facts.get("images"),
        "Preset": facts.get("preset"),
        "Seed": facts.get("seed"),
    }


def _machine(environment: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Where and when the numbers were made; the time in the two largest of its units."""
    finished = environment.get("finished")
    date = datetime.fromisoformat(finished) if finished else datetime.now(UTC)
    device = environment.get("device", "unknown")
    minutes, rest = divmod(round(seconds), 60)
    time = f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return {
        "Device": device,
        "CPU cores": None if "cores" in device else environment.get("cores"),
        "PyTorch": environment["versions"]["torch"],
        "Notebooks' time": time if minutes < 60 else f"{minutes // 60} h {minutes % 60} min",
        "Date": date.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }
