"""What ``inference.py`` tells: rows and facts, and their files, JSON, Markdown and a figure."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from figures.inference import inference

from moee_analysis.models.loading import architecture, fingerprint
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import torch
    from inference import Plan
    from torch import nn

    from moee_analysis.data.images import ImageSet
    from moee_analysis.extraction.pipeline import Extraction
    from moee_analysis.moe.kernels.autotune import Choice

    Row = dict[str, Any]

DENSE = "dense"
ALIKE = "dense, MLPs computed like ours"

COLUMNS = (
    "system", "batch", "threads", "ms", "dense_ms", "speedup", "speedup_low", "speedup_high",
    "alike", "promised", "reached", "first_call", "ways",
)  # fmt: skip
"""Of the table. ``ms`` and ``dense_ms`` are of one call with the whole batch, ``first_call`` is in
seconds; ``speedup`` and its quartiles are of the ratios dense / system within a round, ``alike`` is
the same for the dense model with MLPs computed like ours; ``reached`` is the share of the
``promised`` gain over the dense model, nan where none is promised."""


def speed(
    times: Sequence[float], dense: Sequence[float], alike: Sequence[float], *, promised: float
) -> Row:
    """Numbers of a system from its milliseconds, and those of both dense ones, in each round."""
    low, median, high = np.quantile(np.divide(dense, times), [0.25, 0.5, 0.75]).tolist()
    return {
        "ms": float(np.median(times)), "dense_ms": float(np.median(dense)),
        "speedup": median, "speedup_low": low, "speedup_high": high, "promised": promised,
        "alike": float(np.median(np.divide(alike, times))),
        "reached": (median - 1) / (promised - 1) if promised > 1 else None,
        "rounds_ms": list(times),
    }  # fmt: skip


def reasons(choices: Mapping[int, tuple[torch.Tensor, Choice]]) -> list[Row]:
    """How each layer is computed, why, and the seconds of each way that was tried."""
    return [
        {
            "layer": index, "way": str(choice.way), "reason": choice.reason,
            "seconds": {str(way): seconds for way, seconds in choice.seconds.items()},
        }
        for index, (_, choice) in choices.items()
    ]  # fmt: skip


def told(row: Row) -> str:
    """Return a row in one line, to be printed."""
    return (
        f"  {row['system']}: {row['ms']:.1f} ms, "
        f"speed-up {row['speedup']:.2f} of {row['promised']:.2f}"
    )


def facts_of(
    dense: nn.Module, runs: Mapping[str, Extraction], images: ImageSet, plan: Plan
) -> dict[str, Any]:
    """What decides the numbers, and where they were made."""
    return {
        "model": {"name": architecture(dense), "sha256": fingerprint(dense)},
        "images": {"name": images.name, "count": len(images), "sha256": images.fingerprint},
        "plan": asdict(plan),
        "systems": {name: asdict(each.config) for name, each in runs.items()},
        "date": datetime.now(tz=UTC).date().isoformat(),
        "machine": describe_device(str(next(dense.parameters()).device)),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "versions": versions(),
    }


def write(
    out: Path, facts: dict[str, Any], rows: Sequence[dict[str, Any]], layers: Sequence[dict]
) -> pd.DataFrame:
    """Write all three files into ``out``; return the table that the figure is drawn from."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inference.json", {"facts": facts, "rows": list(rows), "layers": list(layers)})
    table, caption = table_of(rows), how_measured(facts)
    (out / "inference.md").write_text(f"{as_markdown(table)}\n\n{caption}\n")
    inference(table, caption=caption).savefig(out / "inference.png")
    return table


def table_of(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Rows as a table of :data:`COLUMNS`, in their order."""
    told = [row | {"ways": ways(row["choices"])} for row in rows]
    return pd.DataFrame(told, columns=list(COLUMNS)).astype({"reached": "float64"})


def ways(choices: Iterable[dict[str, Any]]) -> str:
    """``3 masked; 8 sorted, 16 groups``: how many layers are computed in which way."""
    counted = Counter(choice["way"] for choice in choices)
    return "; ".join(f"{count} {way}" for way, count in counted.most_common())


def as_markdown(table: pd.DataFrame) -> str:
    """One line for each row, in units that are read easily."""
    header = [
        "threads", "batch", "system", "ms", "dense, ms", "speed-up (quartiles)", "promised",
        "gain reached (%)", "over dense computed alike", "first call (s)", "routed layers",
    ]  # fmt: skip
    lines = [
        [
            str(row.threads), str(row.batch), row.system, f"{row.ms:.1f}", f"{row.dense_ms:.1f}",
            f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
            f"{row.promised:.2f}", _percent(row.reached), f"{row.alike:.2f}",
            f"{row.first_call:.2f}", row.ways or "–",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def _percent(share: float) -> str:
    return "–" if pd.isna(share) else f"{100 * share:.0f}".replace("-", "−")


def how_measured(facts: dict[str, Any]) -> str:
    """What the numbers are of, in a few sentences."""
    plan, images, systems = facts["plan"], facts["images"], facts["systems"]
    seeds = sorted({config["seed"] for config in systems.values()})
    threads = ", ".join(map(str, plan["threads"]))
    return (
        f"{facts['model']['name']}, nothing trained, seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}: how many times as fast as the dense model in the same "
        f"round; medians and quartiles of n = {plan['rounds']} rounds, in which all take turns, "
        f"each for {plan['seconds']:g} s or more, with batches of different images. Promised: the "
        f"dense model's MACs over those with the routes of {images['count']} images "
        f"({images['name']}), routers included. "
        "Computed alike: with the same products, in blocks of tokens. "
        f"{plan['precision']}; threads: {threads}; "
        f"{facts['date']}, {facts['machine']}, torch {facts['versions']['torch']}."
    )
