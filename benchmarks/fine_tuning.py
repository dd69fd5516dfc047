"""What light fine-tuning gives back to mixtures of experts, and to static pruning.

``python benchmarks/fine_tuning.py`` extracts every system at every operating point, trains each
with every seed by the same recipe, and evaluates all on images that were neither calibrated nor
trained with. It writes ``fine_tuning.json``, ``.csv``, ``.md`` and ``.png``, and the curves of all
trainings as ``history.csv`` and ``.png``. What the store holds is not made again.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import common
import pandas as pd
from common import Row
from fidelity import SYSTEMS, Bench, Point
from fidelity_tables import budget_name

from moee_analysis import measure, plots
from moee_analysis.cli.parser import FINETUNE_SETTINGS, add_options, settings
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune

TUNED = {name: read for name, read in FINETUNE_SETTINGS.items() if name != "seed"}
HEAD = (
    "system", "asked", "stage", "top-1 kept (%)", "agreement (%)", "KL (nats)", "MACs (%)",
    "stored (%)",
)  # fmt: skip


def run(
    bench: Bench,
    training: ImageSet,
    config: FinetuneConfig,
    *,
    systems: Sequence[str],
    points: Sequence[Point],
    seeds: Sequence[int],
    out: Path,
) -> pd.DataFrame:
    """Extract, train, evaluate, and write the files in the folder ``out``; return the table.

    Images that are trained on and evaluated are refused, and budgets that cannot be met.
    """
    runs = {name: [bench.extracted(name, point, 0) for point in points] for name in systems}
    table = measure.fine_tuning(
        runs, training, bench.images, config, store=bench.store, seeds=seeds
    )
    named = dict(enumerate(budget_name(point.macs, point.params) for point in points))
    table.insert(1, "asked", table["budget"].map(named))
    first = replace(config, seed=seeds[0])  # whose trainings the store has
    curves = [
        finetune(each, training, first, store=bench.store).history.assign(system=f"{name}, {at}")
        for name, own in runs.items()
        for at, each in zip(named.values(), own, strict=True)
    ]
    facts = bench.facts() | {"config": asdict(config), "training": training.name}
    _write(out, table, pd.concat(curves, ignore_index=True), facts)
    return table


def _write(out: Path, table: pd.DataFrame, curves: pd.DataFrame, facts: Row) -> None:
    caption = table.attrs["caption"]
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    content = {"facts": facts | common.circumstances(), "rows": rows}
    text, figure = f"{text_of(table)}\n\n{caption}\n", plots.fine_tuning(table, caption=caption)
    common.write_files(out, "fine_tuning", content, text, figure)
    table.to_csv(out / "fine_tuning.csv", index=False)
    curves.to_csv(out / "history.csv", index=False)
    told = f"held-out training images, seed {facts['config']['seed']}; a ring: the epoch kept."
    plots.history(curves, caption=told).savefig(out / "history.png")


def text_of(table: pd.DataFrame) -> str:
    """A line for every system, budget and stage: means over the seeds."""
    by, lines = ["system", "asked", "stage"], []
    ordered = table.sort_values(["system", "budget"], kind="stable")
    for names, rows in ordered.groupby(by, sort=False):
        mean = rows.drop(columns=by).mean()
        kept = common.interval(mean, "mean", "low", "high")
        closeness = [f"{100 * mean['agreement']:.1f}", f"{mean['kl']:.4f}"]
        lines.append([*names, kept, *closeness, *common.percent_changes(mean)])
    return common.as_markdown(HEAD, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.INPUTS, "--store")
    parser = common.parser_of("fine_tuning", __doc__, *options, out="reports/fine_tuning")
    add = parser.add_argument
    add("--training", default="bundled", help="folder of class folders to train on")
    add("--limit", type=int, help="images to train on; else all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--points", type=Point.parse, nargs="+", default=[Point(0.36, 0.32)])
    add("--systems", nargs="+", default=["best", "fisher OBS, CLS apart"], choices=SYSTEMS)
    add_options(parser, "finetune", settings(FinetuneConfig, TUNED))
    with common.command(parser, argv) as asked:
        config = FinetuneConfig(**{name: getattr(asked, name) for name in TUNED})
        bench = Bench(*common.inputs(asked), asked.preset, asked.store)
        training = load_images(asked.training, split="train", limit=asked.limit)
        what = {name: getattr(asked, name) for name in ("systems", "points", "seeds")}
        run(bench, training, config, **what, out=asked.out)


if __name__ == "__main__":
    main()
