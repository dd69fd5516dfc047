"""The files of ``clustering.py``: its rows as JSON, Markdown and a figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from figures.clustering_time import clustering_time

from moee_analysis.utils.storage.files import write_json

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    Row = dict[str, Any]

NAMES = {"products": "products of matrices", "hdbscan": "hdbscan, its default"}
STAGES = ("neighbours", "boruvka", "labels")
SETTLED = 2500  # tokens from which exponents are fitted: below, little depends on their number


def write(out: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    found = {"exponents": exponents(rows)}
    write_json(out / "clustering.json", {"facts": facts, "rows": list(rows)} | found)
    caption = how_measured(facts)
    (out / "clustering.md").write_text(f"{as_markdown(rows)}\n\n{caption}\n")
    table = for_figure(rows)
    clustering_time(table, caption=caption).savefig(out / "clustering.png")


def exponents(rows: Iterable[Row]) -> dict[str, float]:
    """Exponent of the tokens in each system's seconds, by least squares of the logarithms."""
    found = {}
    for name, own in pd.DataFrame(rows).groupby("system", sort=False):
        large = own[own["tokens"] >= min(SETTLED, own["tokens"].nlargest(2).min())]
        if len(large) > 1:
            slope, _ = np.polyfit(np.log(large["tokens"]), np.log(large["seconds"]), 1)
            found[name] = float(slope)
    return found


def for_figure(rows: Sequence[Row]) -> pd.DataFrame:
    """Seconds and peaks of memory, systems by their names, each with its exponent."""
    table = pd.DataFrame(rows)[["system", "tokens", "seconds", "peak_gb"]]
    table["exponent"] = table["system"].map(exponents(rows)).astype(float)
    return table.assign(system=table["system"].map(NAMES))


# Words


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    told = f"{row['tokens']:>7,} tokens, {NAMES[row['system']]}: {row['seconds']:.2f} s"
    return f"{told}, {row['peak_gb']:.2f} GB, {row['clusters']} clusters, {row['noise']:.1%} noise"


def as_markdown(rows: Sequence[Row]) -> str:
    """Both systems side by side, one line for each number of tokens."""
    header = [
        "tokens", "products (s)", "neighbours, Borůvka, labels (%)", "searched again (%)",
        "hdbscan (s)", "times faster", "products (GB)", "hdbscan (GB)", "weights differ by",
        "noise differs (tokens)", "ARI",
    ]  # fmt: skip
    by_size: dict[int, dict[str, Row]] = {}
    for row in rows:
        by_size.setdefault(row["tokens"], {})[row["system"]] = row
    lines = [_line(own["products"], own.get("hdbscan")) for own in by_size.values()]
    table = [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines)]
    fits = [f"{NAMES[name]} n^{value:.2f}" for name, value in exponents(rows).items()]
    return "\n".join([*table, "", f"Seconds grow as: {', '.join(fits) or 'not fitted'}."])


def _line(ours: Row, theirs: Row | None) -> list[str]:
    shares = " / ".join(f"{100 * ours[stage] / ours['seconds']:.0f}" for stage in STAGES)
    cells = [
        f"{ours['tokens']:,}",
        f"{ours['seconds']:.2f}",
        shares,
        f"{100 * ours['searched']:.1f}",
    ]
    if theirs is None:
        return [*cells, "–", "–", f"{ours['peak_gb']:.2f}", *["–"] * 4]
    return [
        *cells, f"{theirs['seconds']:.2f}", f"{ours['times_faster']:.1f}",
        f"{ours['peak_gb']:.2f}", f"{theirs['peak_gb']:.2f}", f"{ours['weights_differ']:.1g}",
        str(ours["noise_differs"]), f"{ours['ari']:.5f}",
    ]  # fmt: skip


def how_measured(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    images, settings = facts["images"], facts["settings"]
    return (
        f"HDBSCAN of hidden activations of {facts['layer']}, {facts['dim']} dimensions, of "
        f"{facts['model']['name']} on {images['count']} images ({images['name']}): tokens drawn "
        f"from all {facts['tokens']:,} with seed {facts['seed']}; min_samples "
        f"{settings['min_samples']}, min_cluster_size {settings['min_cluster_size']:.1%}. Every "
        "run once, in a process of its own, after a small one; memory is the largest of the whole "
        "process. In more than 60 dimensions hdbscan's default is Prim's algorithm, exact as well: "
        "only ties let clusters differ. "
        f"{facts['date']}, {facts['machine']}, torch {facts['versions']['torch']}, hdbscan "
        f"{facts['versions']['hdbscan']}."
    )
