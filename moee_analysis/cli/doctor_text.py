"""What ``moee doctor`` prints: for a person, and for machines."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING

from moee_analysis.cli.help import WIDTH

if TYPE_CHECKING:
    from moee_analysis.cli.costs import Cost, Costs
    from moee_analysis.cli.doctor import Check, Diagnosis

MARKS = {(True, True): "✓", (True, False): "✓", (False, True): "✗", (False, False): "·"}
"""By whether a part is there, and whether it is required."""


def diagnosis_json(diagnosis: Diagnosis) -> str:
    """All that was found, as JSON."""
    return json.dumps({"ok": diagnosis.ok, **asdict(diagnosis)}, indent=2)


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """All that was found, in lines: versions, machine, parts, costs, and what to do."""
    found, machine = diagnosis.versions, diagnosis.machine
    lines = [
        *textwrap.wrap(", ".join(f"{name} {version}" for name, version in found.items()), WIDTH),
        f"{machine['python']} on {machine['system']} ({machine['processor']})",
        "",
        *(_check_text(check) for check in diagnosis.checks),
        *([] if diagnosis.costs is None else ["", *_cost_lines(diagnosis.costs)]),
        "",
        _verdict(diagnosis),
    ]
    return "\n".join(lines)


def _check_text(check: Check) -> str:
    line = f"{MARKS[check.ok, check.required]} {check.name:20} {check.found}"
    return line if check.ok else f"{line}\n  {'':20} {check.advice}"


def _cost_lines(costs: Costs) -> list[str]:
    """A line for every run, and how sure that is."""
    return [
        f"About what a run costs here: {costs.model}, {costs.images} images, "
        f"preset {costs.preset}, nothing stored before",
        *map(_cost_text, costs.runs),
        f"  estimated from {1e3 * costs.speed.image:.1f} ms for an image, measured just now; "
        "expect half to twice of it",
    ]


def _cost_text(cost: Cost) -> str:
    return (
        f"  moee {cost.run:24} {duration(cost.seconds):>10}   memory {_size(cost.memory)}   "
        f"disk {_size(cost.disk)}"
    )


def duration(seconds: float) -> str:
    """``seconds`` as a person says it: 40 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def _verdict(diagnosis: Diagnosis) -> str:
    broken = [check.name for check in diagnosis.checks if check.required and not check.ok]
    if broken:
        return f"Does not work: {', '.join(broken)}. What to do stands below each."
    return "All required parts work."
