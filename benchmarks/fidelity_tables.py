"""The files of ``fidelity.py``: its rows as JSON, CSV, Markdown and a figure."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import common
import pandas as pd
from common import Row
from figures import fidelity

COLUMNS = (
    "system", "family", "macs_asked", "params_asked", "seed", "top1", "retention", "retention_low",
    "retention_high", "agreement", "kl", "kl_error", "macs_reduction", "params_reduction",
    "seconds", "dense_top1", "n_images", "reason",
)  # fmt: skip
"""Of ``fidelity.csv``. Shares of 0 to 1, but ``kl`` and its standard error in nats;
``params_asked`` is empty where the parameters are free; ``seconds`` of the extraction, with all
that the store had by then; ``reason`` says why a system is not at this point."""

_WORDS = ("system", "family", "reason")
_POINT = ["macs_asked", "params_asked"]
_IN_FIGURE = (  # as many as can be told apart
    "magnitude", "fisher OBS", "paper", "best", "best, attention too", "ToMe", "merging alone",
    "fisher OBS, attention and merging", "best, all three", "best, all three, random merging",
)  # fmt: skip


def write(out: Path, facts: Row, rows: Sequence[Row], *, order: Sequence[str]) -> pd.DataFrame:
    """Write all four files into ``out``, systems in their ``order``; return the CSV's table."""
    table = table_of(rows, order)
    summary, caption = over_seeds(table), _caption(facts, table)
    content, text = {"facts": facts, "rows": list(rows)}, f"{_text(summary)}\n{caption}\n"
    figure = fidelity(for_figure(summary), caption=caption)
    common.write_files(out, "fidelity", content, text, figure)
    table.to_csv(out / "fidelity.csv", index=False)
    return table


def table_of(rows: Iterable[Row], order: Sequence[str]) -> pd.DataFrame:
    """Rows as a table of :data:`COLUMNS`: systems in their ``order``, then by their budgets."""
    ordered = sorted(rows, key=lambda r: (order.index(r["system"]), *_place(r), r["seed"]))
    table = pd.DataFrame(ordered, columns=list(COLUMNS))
    numbers = [name for name in COLUMNS if name not in (*_WORDS, "seed")]
    return table.astype(dict.fromkeys(numbers, "float64"))


def over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the seeds; intervals reach from the lowest low end to the highest high end."""
    by = ["system", "family", *_POINT]
    steps = {name: "mean" for name in COLUMNS if name not in (*by, "seed", "reason")}
    steps |= {"retention_low": "min", "retention_high": "max", "reason": "first"}
    return table.groupby(by, sort=False, dropna=False, as_index=False).agg(steps)


def for_figure(summary: pd.DataFrame) -> pd.DataFrame:
    """Leave systems out where there are more than can be told apart."""
    if summary["system"].nunique() <= len(_IN_FIGURE):
        return summary
    return summary[summary["system"].isin(_IN_FIGURE)]


def budget_name(macs: float, params: float | None) -> str:
    """``−28 %``, or ``−29 % / −20 %`` where the parameters are bound as well."""
    bound = [macs] if params is None or pd.isna(params) else [macs, params]
    return " / ".join(f"−{100 * share:g} %" for share in bound)


def _place(row: Row) -> tuple[bool, float, float]:
    """Where a budget stands among others: first those that leave the parameters free."""
    bound = pd.notna(row["params_asked"])
    return bound, row["macs_asked"], row["params_asked"] if bound else 0.0


# Words


def _text(summary: pd.DataFrame) -> str:
    """Retention of every system at every point, all numbers, and what could not be reached."""
    rows = summary.to_dict("records")
    missing = [row for row in rows if isinstance(row["reason"], str)]
    reasons = "\n".join(f"- {r['system']}, {_budget(r)}: {r['reason']}" for r in missing)
    return "\n\n".join(filter(None, [_overview(rows), _details(rows), reasons])) + "\n"


def _caption(facts: Row, table: pd.DataFrame) -> str:
    """What the numbers are of, in a few sentences."""
    images, calibration = facts["images"], facts["calibration"]
    seeds = sorted(table["seed"].unique())
    several = "; of several seeds the means, and the lowest and highest ends" * (len(seeds) > 1)
    dense = table["dense_top1"].max()
    return (
        f"{facts['model']['name']}, nothing trained: share of the dense model's top-1 "
        f"({dense:.1%}) on {images['count']} images ({images['name']}), with 95 % intervals of "
        f"the image bootstrap{several}. Calibrated on {calibration['count']} others "
        f"({calibration['name']}); preset {facts['preset']}, {common.plural('seed', seeds)}. "
        "MACs: routers included (random routing has none), with the routes of the evaluated "
        "images. Seconds: of what the store did not hold yet. "
        f"{common.place_and_time(facts)}"
    )


def _overview(rows: Sequence[Row]) -> str:
    """One line for each system, one column for each budget."""
    budgets = list(dict.fromkeys(_budget(row) for row in sorted(rows, key=_place)))
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        cells.setdefault(row["system"], {})[_budget(row)] = _retention(row)
    lines = [[name, *(known.get(b, "–") for b in budgets)] for name, known in cells.items()]
    return common.as_markdown(["retention (%)", *budgets], lines)


def _details(rows: Sequence[Row]) -> str:
    header = [
        "budget", "system", "top-1 (%)", "retention (%)", "agreement (%)", "KL (nats)", "MACs (%)",
        "parameters (%)", "extraction (s)",
    ]  # fmt: skip
    lines = [
        [
            _budget(row), row["system"], f"{100 * row['top1']:.1f}", _retention(row),
            f"{100 * row['agreement']:.1f}", f"{row['kl']:.4f} ± {row['kl_error']:.4f}",
            *common.percent_changes(row),
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(rows, key=_place)
        if pd.notna(row["top1"])
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _budget(row: Row) -> str:
    return budget_name(row["macs_asked"], row["params_asked"])


def _retention(row: Row) -> str:
    return common.interval(row, "retention", "retention_low", "retention_high")
