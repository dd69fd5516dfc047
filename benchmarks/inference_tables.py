"""The table, the figures and the caption of `inference.py`."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import common
import pandas as pd
from common import Row
from engines import TORCH
from figures import inference, kl_against_time

COLUMNS = (
    "system", "engine", "batch", "threads", "ms", "dense_ms", "speedup", "speedup_low",
    "speedup_high", "promised", "reached", "kl", "agreement", "first_call", "ways",
)  # fmt: skip
"""Of the table. ``ms`` and ``dense_ms`` are of one call with the whole batch in the same engine,
``first_call`` is in seconds; ``speedup`` and its quartiles are of the ratios dense / system within
a round; ``reached`` is the share of the ``promised`` gain over the dense model, nan where none is
promised. ``kl`` (nats) and ``agreement`` compare with torch's dense model, nan without classes."""


def write(out: Path, facts: Row, rows: Sequence[Row], layers: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    table, caption = table_of(rows), _caption(facts)
    content = {"facts": facts, "rows": list(rows), "layers": list(layers)}
    in_torch = table[table["engine"] == TORCH]
    text, figure = f"{_text(table)}\n\n{caption}\n", inference(in_torch, caption=caption)
    common.write_files(out, "inference", content, text, figure)
    kl_against_time(table, caption=caption).savefig(out / "inference_kl.png")


def table_of(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table of :data:`COLUMNS`, in their order."""
    found = [row | {"ways": count_ways(row["choices"])} for row in rows]
    return pd.DataFrame(found, columns=list(COLUMNS)).astype(
        dict.fromkeys(("reached", "kl", "agreement"), "float64")
    )


def count_ways(choices: Iterable[Row]) -> str:
    """``3 masked; 8 sorted, 16 groups``: how many layers are computed in which way."""
    counted = Counter(choice["way"] for choice in choices)
    return "; ".join(f"{count} {way}" for way, count in counted.most_common())


def _text(table: pd.DataFrame) -> str:
    """One line for each row, in units that are read easily."""
    header = [
        "threads", "batch", "engine", "system", "ms", "dense, ms", "speed-up (quartiles)",
        "promised", "gain reached (%)", "KL (nats)", "agreement (%)", "first call (s)",
        "routed layers",
    ]  # fmt: skip
    lines = [
        [
            str(row.threads), str(row.batch), row.engine, row.system, f"{row.ms:.1f}",
            f"{row.dense_ms:.1f}",
            f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
            f"{row.promised:.2f}",
            "–" if pd.isna(row.reached) else f"{100 * row.reached:.0f}".replace("-", "−"),
            "–" if pd.isna(row.kl) else f"{row.kl:.4f}",
            "–" if pd.isna(row.agreement) else f"{100 * row.agreement:.1f}",
            f"{row.first_call:.2f}", row.ways or "–",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _caption(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    plan, images = facts["plan"], facts["images"]
    seeds = sorted({config["seed"] for config in facts["systems"].values()})
    left = ", ".join(facts["engines_left_out"])
    return (
        f"{facts['model']['name']}, nothing trained, {common.plural('seed', seeds)}: "
        "how many times as fast as the dense model of the same engine in the same round; medians "
        "and quartiles of "
        f"n = {plan['rounds']} rounds, in which all take turns, "
        f"each for {plan['seconds']:g} s or more, with batches of different images. Promised: the "
        f"dense model's MACs over those with the routes of {images['count']} images "
        f"({images['name']}), routers included, on which KL and agreement are too. Engines: "
        f"{', '.join(plan['engines'])}{f' (not here: {left})' if left else ''}. "
        f"{plan['precision']}; threads: {', '.join(map(str, plan['threads']))}. "
        "Speed-ups are drawn of torch, KL of every engine with the most threads. "
        f"{facts['processor']}; {common.place_and_time(facts)}"
    )
