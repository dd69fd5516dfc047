"""The files of ``scale.py``: measured seconds, and what follows from them for ImageNet."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from moee_analysis.utils.storage.files import write_json

if TYPE_CHECKING:
    from pathlib import Path

    Row = dict[str, Any]

IMAGENET = 1_281_167  # images of the train set
PROCESSES = (1, 8, 64)
ASSUMED = 1e13  # MACs a second of one GPU in single precision; nothing here has measured one


def write(out: Path, facts: Row, speed: Row, known: dict[str, Row]) -> None:
    """Write both files into ``out``."""
    plans = {name: worked_out(facts, speed, known, name) for name in known}
    content = {"facts": facts, "measured": speed, "sizes": known, "imagenet": plans}
    write_json(out / "scale.json", content)
    parts = [measured_table(speed), size_table(known), time_table(plans), how_measured(facts)]
    (out / "scale.md").write_text("\n\n".join(parts) + "\n")


def worked_out(facts: Row, speed: Row, known: dict[str, Row], name: str) -> list[Row]:
    """Hours, gigabytes and traffic for one model, by the number of processes."""
    own, base = known[name], known[facts["measured"]]
    work = own["macs"] / base["macs"]
    # sums go with tokens times layers times dim, which the tokens' bytes do, the refit's squared
    wide = own["tokens"] / base["tokens"]
    square = wide * own["dim"] / base["dim"]
    looked_at = min(IMAGENET, facts["looked_at"] * facts["part"])
    passes = own["passes"]
    graded = (passes["drawing"] + passes["statistics"]) * IMAGENET + looked_at
    plain = passes["refit"] * IMAGENET
    model = work * (speed["gradients"] * graded + speed["forward"] * plain)
    sums = IMAGENET * wide * (speed["sums of drawing"] + speed["sums of statistics"])
    sums += IMAGENET * square * speed["sums of refit"]
    rate = base["macs"] / speed["forward"]
    return [
        {
            "processes": n,
            "hours_model": model / n / 3600,
            "hours_sums": sums / n / 3600,
            "seconds_clusters": math.ceil(own["layers"] / n) * speed["clustering of a layer"],
            "hours_gpu": (model + sums) * rate / ASSUMED / n / 3600,
            "memory": sum(own["memory"].values()),
            "sent": 2 * (n - 1) / n * sum(own["sums"].values()),
        }
        for n in PROCESSES
    ]


def measured_table(speed: Row) -> str:
    """Seconds of an image, as they were measured."""
    names = ["forward", "gradients", *(name for name in speed if name.startswith("sums"))]
    lines = [[name, f"{speed[name]:.3f}"] for name in names]
    return _table(["of one image", "seconds"], lines)


def size_table(known: dict[str, Row]) -> str:
    """What every model costs, and bytes."""
    header = [
        "model", "GMACs", "M parameters", "tokens of an image (MB)", "weights (GB)",
        "activations (GB)", "part and chunk (GB)", "sums (GB)", "memory (GB)", "passes",
    ]  # fmt: skip
    lines = []
    for name, own in known.items():
        sizes = [f"{value / 1e9:.1f}" for value in own["memory"].values()]
        total = f"{sum(own['memory'].values()) / 1e9:.1f}"
        passes = " + ".join(str(count) for count in own["passes"].values())
        lines.append(
            [name, f"{own['macs'] / 1e9:.1f}", f"{own['parameters'] / 1e6:.0f}",
             f"{own['tokens'] / 1e6:.1f}", *sizes, total, passes]
        )  # fmt: skip
    return _table(header, lines)


def time_table(plans: dict[str, list[Row]]) -> str:
    """Hours and traffic on the full train set."""
    header = [
        "model", "processes", "the model (h)", "sums (h)", "clustering (s)",
        "on GPUs, assumed (h)", "memory of each (GB)", "sent by each (GB)",
    ]  # fmt: skip
    lines = [
        [name, str(row["processes"]), f"{row['hours_model']:.0f}", f"{row['hours_sums']:.0f}",
         f"{row['seconds_clusters']:.1f}", f"{row['hours_gpu']:.2f}", f"{row['memory'] / 1e9:.1f}",
         f"{row['sent'] / 1e9:.1f}"]
        for name, rows in plans.items()
        for row in rows
    ]  # fmt: skip
    return _table(header, lines)


def how_measured(facts: Row) -> str:
    """What the numbers are of."""
    return (
        f"{facts['measured']}, random weights, recipe best, {facts['experts']} experts a layer, "
        f"no tokens on the disk; {facts['date']}, {facts['machine']}, {facts['threads']} threads, "
        f"torch {facts['versions']['torch']}. A process here has these two cores. Other models are "
        "scaled by their MACs, and their sums by tokens, layers and widths. For a GPU "
        f"{ASSUMED / 1e12:.0f} TMAC/s in single precision are assumed, for the model and the sums "
        "alike; no GPU was measured."
    )


def _table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))
