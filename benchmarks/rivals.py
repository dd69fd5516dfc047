"""All systems that need no training, at the same MACs.

``python benchmarks/rivals.py`` converts a model by every system at every budget with every seed,
and measures all of them, with their controls, on images that were not used for calibration. It
writes ``rivals.json``, ``.csv`` and ``.md``, and two figures, after each budget; those that are in
``rivals.json`` are not measured again.
"""

from collections.abc import Sequence
from pathlib import Path

import common
import pandas as pd
from common import Row

from moee_analysis import plots
from moee_analysis.baselines.registry import SYSTEMS, systems_named
from moee_analysis.measure.evaluation.comparison import POINTS, Contest, compare, comparison_table

HEAD = (
    "system", "top-1 kept (%)", "agreement (%)", "KL (nats)",
    "random, constant, oracle routing (%)", "MACs (%)", "stored (%)", "times as fast", "evenness",
    "seconds",
)  # fmt: skip


def run(
    contest: Contest,
    *,
    macs_reductions: Sequence[float],
    seeds: Sequence[int],
    systems: Sequence[str] | None,
    out: Path,
) -> pd.DataFrame:
    """Measure the budgets that the folder ``out`` does not have yet; return the whole table.

    An ``out`` of another model, other images, systems or seeds is refused.
    """
    facts = common.facts_of(contest.dense, images=contest.images, calibration=contest.calibration)
    names = list(systems_named(systems))
    facts |= {"preset": contest.preset, "seeds": list(seeds), "systems": names}
    found = common.read_results(out / "rivals.json", facts)
    rows = found["rows"] if found else []
    for saved in macs_reductions:
        if saved not in {row["macs_asked"] for row in rows}:
            rows += compare(contest, macs_reductions=[saved], seeds=seeds, systems=systems)
            write(out, facts | common.circumstances(), rows)
    return comparison_table(rows)


def write(out: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Write all files into ``out``."""
    rows = sorted(rows, key=lambda row: row["macs_asked"])
    table = comparison_table(rows)
    caption, content = _caption(facts, table), {"facts": facts, "rows": rows}
    common.write_files(out, "rivals", content, f"{text_of(table)}\n{caption}\n", None)
    table.to_csv(out / "rivals.csv", index=False)
    for plot in (plots.comparison, plots.routing_controls):
        plot(table, caption=caption).savefig(out / f"{plot.__name__}.png")


def text_of(table: pd.DataFrame) -> str:
    """One table for each budget, the systems that keep most first; then what could not be made."""
    parts = []
    for asked, rows in table.groupby("macs_asked", sort=True):
        made = rows.dropna(subset="mean")
        means = made.groupby("system", sort=False).mean(numeric_only=True)
        means["speed_up"] = made.groupby("system")["speed_up"].max()
        ordered = means.sort_values("mean", ascending=False)
        lines = common.as_markdown(HEAD, [_line(name, row) for name, row in ordered.iterrows()])
        missing = rows[rows["reason"] != ""].drop_duplicates("system")
        reasons = "\n".join(f"- {row.system}: {row.reason}" for row in missing.itertuples())
        title = f"Asked to save {100 * asked:g} % of the MACs:"
        parts += filter(None, [title, lines, reasons])
    return "\n\n".join(parts) + "\n"


def _line(name: str, row: pd.Series) -> list[str]:
    controls = ("random_routing", "constant_routing", "oracle_routing")
    return [
        name, common.interval(row, "mean", "low", "high"), f"{100 * row['agreement']:.1f}",
        f"{row['kl']:.3f}", ", ".join(_known(100 * row[control], ".1f") for control in controls),
        *common.percent_changes(row),
        _known(row["speed_up"], ".2f"), _known(row["entropy"], ".2f"), f"{row['seconds']:.0f}",
    ]  # fmt: skip


def _known(value: float, form: str) -> str:
    return "–" if pd.isna(value) else format(value, form)


def _caption(facts: Row, table: pd.DataFrame) -> str:
    images, calibration = facts["images"], facts["calibration"]
    return (
        f"{facts['model']['name']}, nothing trained but the routers of MoEfication: share of the "
        f"dense model's top-1 ({table['dense_top1'].max():.1%}) on {images['count']} images "
        f"({images['name']}), calibrated on {calibration['count']} others ({calibration['name']}); "
        f"preset {facts['preset']}, {common.plural('seed', facts['seeds'])}. "
        f"{table.attrs['caption']} Seconds: of what the store did not hold yet. "
        f"{common.place_and_time(facts)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.INPUTS, "--store", "--limit", "--seeds")
    parser = common.parser_of("rivals", __doc__, *options, out="reports/rivals")
    add = parser.add_argument
    add("--macs-reductions", type=float, nargs="+", default=POINTS, help="shares to save")
    add("--systems", nargs="+", choices=SYSTEMS, help="else all")
    with common.command(parser, argv) as asked:
        contest = Contest(*common.inputs(asked, limit=asked.limit), asked.preset, asked.store)
        what = {name: getattr(asked, name) for name in ("macs_reductions", "seeds", "systems")}
        run(contest, **what, out=asked.out)


if __name__ == "__main__":
    main()
