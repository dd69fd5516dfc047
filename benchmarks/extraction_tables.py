"""The files of ``extraction.py``: its rows as JSON, Markdown and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd
from figures.extraction_time import extraction_time

from moee_analysis.utils.storage.files import write_json

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    Row = dict[str, Any]


def write(out: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    write_json(out / "extraction.json", {"facts": facts, "rows": list(rows)})
    caption = how_measured(facts)
    (out / "extraction.md").write_text(f"{as_markdown(rows)}\n\n{caption}\n")
    extraction_time(for_figure(rows), caption=caption).savefig(out / "extraction.png")


def for_figure(rows: Sequence[Row]) -> pd.DataFrame:
    """A row for each stage: how many plain forward passes it took."""
    return pd.DataFrame(
        {"recipe": row["recipe"], "images": row["images"], "stage": stage,
         "passes": seconds / row["plain"]}
        for row in rows
        for stage, seconds in row["stages"].items()
    )  # fmt: skip


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    return (
        f"{row['recipe']}, {row['images']} images: {row['seconds']:.0f} s, {row['times']:.1f} "
        f"times a plain pass of {row['plain']:.0f} s; {row['peak'] / 1e9:.1f} GB "
        f"(told {row['told'] / 1e9:.1f}), {row['disk'] / 1e9:.1f} GB on disk"
    )


def as_markdown(rows: Sequence[Row]) -> str:
    """One line for each extraction; stages in per cent of its time."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    stages.sort(key="other".__eq__)
    header = ["recipe", "images", "plain pass (s)", "extraction (s)", "times the pass"]
    header += [f"{stage} (%)" for stage in stages]
    header += ["memory (GB)", "told before (GB)", "disk (GB)"]
    lines = [header, ["---"] * len(header), *(_line(row, stages) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _line(row: Row, stages: Sequence[str]) -> list[str]:
    shares = [row["stages"].get(stage, 0.0) / row["seconds"] for stage in stages]
    sizes = [f"{row[name] / 1e9:.1f}" for name in ("peak", "told", "disk")]
    return [
        row["recipe"], str(row["images"]), f"{row['plain']:.1f}", f"{row['seconds']:.1f}",
        f"{row['times']:.1f}", *(f"{100 * share:.0f}" for share in shares), *sizes,
    ]  # fmt: skip


def how_measured(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    return (
        f"Extraction of {facts['model']['name']}, preset {facts['preset']}, "
        f"−{facts['macs_reduction']:.0%} MACs, calibrated on {facts['images']}, "
        f"seed {facts['seed']}, nothing stored before; each once, in a process of its "
        "own. A plain pass is one of the dense model over the same "
        "images, decoding included, the mean of one before and one after. Memory is the largest of "
        f"the process beyond what it had before the extraction. {facts['date']}, "
        f"{facts['machine']}, {facts['threads']} threads, torch {facts['versions']['torch']}."
    )
