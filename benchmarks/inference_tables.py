"""The files of ``inference.py``: rows and facts as JSON, Markdown and a figure."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from common import Row
from figures import inference
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.run import Extraction
from moee_analysis.moe.kernels.autotune import Choice
from moee_analysis.utils.storage.files import write_json

DENSE = "dense"

COLUMNS = (
    "system", "batch", "threads", "ms", "dense_ms", "speedup", "speedup_low", "speedup_high",
    "promised", "reached", "first_call", "ways",
)  # fmt: skip
"""Of the table. ``ms`` and ``dense_ms`` are of one call with the whole batch, ``first_call`` is in
seconds; ``speedup`` and its quartiles are of the ratios dense / system within a round; ``reached``
is the share of the ``promised`` gain over the dense model, nan where none is promised."""


@dataclass(frozen=True)
class Plan:
    """What is timed: every batch with every number of threads, so many rounds of ``seconds``."""

    batches: tuple[int, ...]
    threads: tuple[int, ...]
    seconds: float
    rounds: int
    precision: str = "fp32"


def speed(times: Sequence[float], dense: Sequence[float], *, promised: float) -> Row:
    """Numbers of a system from its milliseconds, and those of the dense model, in each round."""
    low, median, high = np.quantile(np.divide(dense, times), [0.25, 0.5, 0.75]).tolist()
    return {
        "ms": float(np.median(times)), "dense_ms": float(np.median(dense)),
        "speedup": median, "speedup_low": low, "speedup_high": high, "promised": promised,
        "reached": (median - 1) / (promised - 1) if promised > 1 else None,
        "rounds_ms": list(times),
    }  # fmt: skip


def reasons(choices: Mapping[int, tuple[torch.Tensor, Choice]]) -> list[Row]:
    """How each layer is computed, why, and the seconds of each strategy that was tried."""
    return [
        {
            "layer": index, "way": str(choice.strategy), "reason": choice.reason,
            "seconds": {str(each): seconds for each, seconds in choice.seconds.items()},
        }
        for index, (_, choice) in choices.items()
    ]  # fmt: skip


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    return (
        f"  {row['system']}: {row['ms']:.1f} ms, "
        f"speed-up {row['speedup']:.2f} of {row['promised']:.2f}"
    )


def describe(dense: nn.Module, runs: Mapping[str, Extraction], images: ImageSet, plan: Plan) -> Row:
    """What decides the numbers, and where they were made."""
    return {
        **common.facts_of(dense, images=images), "plan": asdict(plan),
        "systems": {name: asdict(each.config) for name, each in runs.items()},
        **common.circumstances(str(next(dense.parameters()).device)),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip


def write(out: Path, facts: Row, rows: Sequence[Row], layers: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "inference.json", {"facts": facts, "rows": list(rows), "layers": list(layers)})
    table, caption = table_of(rows), caption_of(facts)
    (out / "inference.md").write_text(f"{text_of(table)}\n\n{caption}\n")
    inference(table, caption=caption).savefig(out / "inference.png")


def table_of(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table of :data:`COLUMNS`, in their order."""
    found = [row | {"ways": count_ways(row["choices"])} for row in rows]
    return pd.DataFrame(found, columns=list(COLUMNS)).astype({"reached": "float64"})


def count_ways(choices: Iterable[Row]) -> str:
    """``3 masked; 8 sorted, 16 groups``: how many layers are computed in which way."""
    counted = Counter(choice["way"] for choice in choices)
    return "; ".join(f"{count} {way}" for way, count in counted.most_common())


def text_of(table: pd.DataFrame) -> str:
    """One line for each row, in units that are read easily."""
    header = [
        "threads", "batch", "system", "ms", "dense, ms", "speed-up (quartiles)", "promised",
        "gain reached (%)", "first call (s)", "routed layers",
    ]  # fmt: skip
    lines = [
        [
            str(row.threads), str(row.batch), row.system, f"{row.ms:.1f}", f"{row.dense_ms:.1f}",
            f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
            f"{row.promised:.2f}", _percent(row.reached), f"{row.first_call:.2f}", row.ways or "–",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _percent(share: float) -> str:
    return "–" if pd.isna(share) else f"{100 * share:.0f}".replace("-", "−")


def caption_of(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    plan, images = facts["plan"], facts["images"]
    seeds = sorted({config["seed"] for config in facts["systems"].values()})
    return (
        f"{facts['model']['name']}, nothing trained, {common.plural('seed', seeds)}: "
        "how many times as fast as the dense model in the same round; medians and quartiles of "
        f"n = {plan['rounds']} rounds, in which all take turns, "
        f"each for {plan['seconds']:g} s or more, with batches of different images. Promised: the "
        f"dense model's MACs over those with the routes of {images['count']} images "
        f"({images['name']}), routers included. "
        f"{plan['precision']}; threads: {', '.join(map(str, plan['threads']))}; "
        f"{facts['date']}, {facts['machine']}, torch {facts['versions']['torch']}."
    )
