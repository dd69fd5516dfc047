"""All systems that need no training, at the same MACs.

``python benchmarks/rivals.py`` converts a model by every system at every budget with every seed,
and measures all of them, with their controls, on images that were not used for calibration. It
writes ``rivals.json``, ``.csv`` and ``.md``, and two figures, after each budget; those that are in
``rivals.json`` are not measured again.
"""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from fidelity import add_inputs, inputs
from fidelity_tables import change

from moee_analysis import plots
from moee_analysis.baselines.registry import SYSTEMS, systems_named
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.comparison import POINTS, Contest, compare
from moee_analysis.measure.evaluation.comparison_table import comparison_table
from moee_analysis.models.loading import architecture, fingerprint
from moee_analysis.utils.paths import store_folder
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    Row = dict[str, Any]

HEAD = """\
| system | top-1 kept (%) | agreement (%) | KL (nats) | random, constant, oracle routing (%) \
| MACs (%) | stored (%) | times as fast | evenness | seconds |
|---|---|---|---|---|---|---|---|---|---|"""


def run(
    contest: Contest,
    *,
    macs_reductions: Sequence[float],
    seeds: Sequence[int],
    systems: Sequence[str] | None,
    out: Path,
) -> pd.DataFrame:
    """Measure the budgets that the folder ``out`` does not have yet; return the whole table.

    Raises
    ------
    MoeeError
        An ``out`` of another model, other images, systems or seeds.
    """
    facts = _facts(contest, seeds, systems)
    rows = _found(out, facts)
    for saved in macs_reductions:
        if saved not in {row["macs_asked"] for row in rows}:
            rows += compare(contest, macs_reductions=[saved], seeds=seeds, systems=systems)
            write(out, facts | _circumstances(), rows)
    return comparison_table(rows)


def write(out: Path, facts: dict[str, Any], rows: Sequence[Row]) -> None:
    """Write all files into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    rows = sorted(rows, key=lambda row: row["macs_asked"])
    table = comparison_table(rows)
    write_json(out / "rivals.json", {"facts": facts, "rows": rows})
    table.to_csv(out / "rivals.csv", index=False)
    caption = _caption(facts, table)
    (out / "rivals.md").write_text(f"{as_markdown(table)}\n{caption}\n")
    for name in ("comparison", "routing_controls"):
        getattr(plots, name)(table, caption=caption).savefig(out / f"{name}.png")


def as_markdown(table: pd.DataFrame) -> str:
    """One table for each budget, the systems that keep most first; then what could not be made."""
    parts = []
    for asked, rows in table.groupby("macs_asked", sort=True):
        made = rows.dropna(subset="mean")
        means = made.groupby("system", sort=False).mean(numeric_only=True)
        means = means.join(made.groupby("system")["speed_up"].max(), rsuffix="_first")
        ordered = means.sort_values("mean", ascending=False)
        lines = [_line(name, row) for name, row in ordered.iterrows()]
        missing = rows[rows["reason"] != ""].drop_duplicates("system")
        reasons = [f"- {row.system}: {row.reason}" for row in missing.itertuples()]
        title = f"Asked to save {100 * asked:g} % of the MACs:"
        parts.append("\n".join([title, "", HEAD, *lines, *([""] if reasons else []), *reasons]))
    return "\n\n".join(parts) + "\n"


def _line(name: str, row: pd.Series) -> str:
    controls = ("random_routing", "constant_routing", "oracle_routing")
    cells = [
        name,
        f"{100 * row['mean']:.1f} ({100 * row['low']:.1f} to {100 * row['high']:.1f})",
        f"{100 * row['agreement']:.1f}",
        f"{row['kl']:.3f}",
        ", ".join(_known(row[control], "{:.1f}", 100) for control in controls),
        change(row["macs_reduction"]),
        change(row["params_reduction"]),
        _known(row["speed_up"], "{:.2f}"),
        _known(row["entropy"], "{:.2f}"),
        f"{row['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def _known(value: float, form: str, scale: float = 1) -> str:
    return "–" if pd.isna(value) else form.format(scale * value)


def _facts(contest: Contest, seeds: Sequence[int], systems: Sequence[str] | None) -> dict[str, Any]:
    """What decides the numbers."""
    sets = {"images": contest.images, "calibration": contest.calibration}
    told = {k: {"name": s.name, "count": len(s), "sha256": s.fingerprint} for k, s in sets.items()}
    model = {"name": architecture(contest.dense), "sha256": fingerprint(contest.dense)}
    made = {"preset": contest.preset, "seeds": list(seeds), "systems": list(systems_named(systems))}
    return {"model": model, **told, **made}


def _circumstances() -> dict[str, Any]:
    today = datetime.now(tz=UTC).date().isoformat()
    return {"date": today, "machine": describe_device("cpu"), "versions": versions()}


def _found(out: Path, facts: dict[str, Any]) -> list[Row]:
    file = out / "rivals.json"
    if not file.is_file():
        return []
    content = json.loads(file.read_text())
    other = [name for name, value in facts.items() if content["facts"].get(name) != value]
    if other:
        raise MoeeError(
            f"results of the same {', '.join(other)} in '{file}'", "those of another",
            "choose another --out",
        )  # fmt: skip
    return content["rows"]


def _caption(facts: dict[str, Any], table: pd.DataFrame) -> str:
    images, calibration = facts["images"], facts["calibration"]
    return (
        f"{facts['model']['name']}, nothing trained but the routers of MoEfication: share of the "
        f"dense model's top-1 ({table['dense_top1'].max():.1%}) on {images['count']} images "
        f"({images['name']}), calibrated on {calibration['count']} others ({calibration['name']}); "
        f"preset {facts['preset']}, seeds {', '.join(map(str, facts['seeds']))}. "
        f"{table.attrs['caption']} Seconds: of what the store did not hold yet. {facts['date']}, "
        f"{facts['machine']}, torch {facts['versions']['torch']}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        contest = Contest(*inputs(options), options.preset, options.store or store_folder())
        asked = {n: getattr(options, n) for n in ("macs_reductions", "seeds", "systems", "out")}
        run(contest, **asked)
    except MoeeError as error:
        parser.exit(2, f"rivals: {error}\n")
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_inputs(parser)
    add("--limit", type=int, help="images to measure on; else as many as the preset says")
    add("--macs-reductions", type=float, nargs="+", default=POINTS, help="shares to save")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--systems", nargs="+", choices=SYSTEMS, help="else all")
    add("--store", type=Path, help="store of recordings and runs; else the user's own")
    add("--out", type=Path, default=Path("reports/rivals"))
    return parser


if __name__ == "__main__":
    main()
