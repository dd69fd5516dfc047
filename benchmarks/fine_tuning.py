"""What light fine-tuning gives back to mixtures of experts, and to static pruning.

``python benchmarks/fine_tuning.py`` extracts every system at every operating point, trains each
with every seed by the same recipe, and evaluates all on images that were neither calibrated nor
trained with. It writes ``fine_tuning.json``, ``.csv``, ``.md`` and ``.png``, and the curves of all
trainings as ``history.csv`` and ``.png``. What the store holds is not made again.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
from fidelity import SYSTEMS, Bench, Point, add_inputs
from fidelity_tables import budget_name, change

from moee_analysis import measure, plots
from moee_analysis.cli.parser import FINETUNE_SETTINGS, add_options, settings
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.models.loading import load_model
from moee_analysis.training.finetune import finetune
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.utils.paths import store_folder
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from moee_analysis.data.images import ImageSet
    from moee_analysis.extraction.run import Extraction

TUNED = {name: read for name, read in FINETUNE_SETTINGS.items() if name != "seed"}
HEAD = """\
| system | asked | stage | top-1 kept (%) | agreement (%) | KL (nats) | MACs (%) | stored (%) |
|---|---|---|---|---|---|---|---|"""


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

    Raises
    ------
    MoeeError
        Images that are trained on and evaluated; a budget that cannot be met.
    """
    runs = {name: [bench.extracted(name, point, 0) for point in points] for name in systems}
    table = measure.fine_tuning(
        runs, training, bench.images, config, store=bench.store, seeds=seeds
    )
    named = dict(enumerate(budget_name(point.macs, point.params) for point in points))
    table.insert(1, "asked", table["budget"].map(named))
    curves = _curves(runs, training, replace(config, seed=seeds[0]), bench.store, named)
    out.mkdir(parents=True, exist_ok=True)
    facts = bench.facts() | {"config": asdict(config), "training": training.name}
    _write(out, table, curves, facts)
    return table


def _curves(
    runs: Mapping[str, Sequence[Extraction]],
    training: ImageSet,
    config: FinetuneConfig,
    store: Path,
    named: Mapping[int, str],
) -> pd.DataFrame:
    """Histories of the trainings with the first seed; the store has them."""
    curves = [
        finetune(each, training, config, store=store).history.assign(system=f"{name}, {named[n]}")
        for name, own in runs.items()
        for n, each in enumerate(own)
    ]
    return pd.concat(curves, ignore_index=True)


def _write(out: Path, table: pd.DataFrame, curves: pd.DataFrame, facts: dict[str, Any]) -> None:
    caption = table.attrs["caption"]
    circumstances = {"machine": describe_device("cpu"), "versions": versions()}
    rows = table.astype(object).where(table.notna(), None).to_dict("records")
    write_json(out / "fine_tuning.json", {"facts": facts | circumstances, "rows": rows})
    table.to_csv(out / "fine_tuning.csv", index=False)
    curves.to_csv(out / "history.csv", index=False)
    (out / "fine_tuning.md").write_text(f"{as_markdown(table)}\n\n{caption}\n")
    plots.fine_tuning(table, caption=caption).savefig(out / "fine_tuning.png")
    told = f"held-out training images, seed {facts['config']['seed']}; a ring: the epoch kept."
    plots.history(curves, caption=told).savefig(out / "history.png")


def as_markdown(table: pd.DataFrame) -> str:
    """A line for every system, budget and stage: means over the seeds."""
    by, lines = ["system", "asked", "stage"], [HEAD]
    ordered = table.sort_values(["system", "budget"], kind="stable")
    for (system, asked, stage), rows in ordered.groupby(by, sort=False):
        mean = rows.drop(columns=by).mean()
        kept, low, high = 100 * mean[["mean", "low", "high"]]
        lines.append(
            f"| {system} | {asked} | {stage} | {kept:.1f} ({low:.1f} to {high:.1f}) | "
            f"{100 * mean['agreement']:.1f} | {mean['kl']:.4f} | "
            f"{change(mean['macs_reduction'])} | {change(mean['params_reduction'])} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    sizes = preset_named(options.preset)
    given = {name: getattr(options, name) for name in TUNED}
    try:
        config = FinetuneConfig(**given)
        bench = Bench(
            load_model(options.model, weights=options.weights),
            load_images(options.calibration, split="calibration", limit=sizes.calibration_images),
            load_images(options.images, limit=sizes.evaluation_images),
            options.preset,
            options.store or store_folder(),
        )
        training = load_images(options.training, split="train", limit=options.limit)
        asked = {name: getattr(options, name) for name in ("systems", "points", "seeds", "out")}
        run(bench, training, config, **asked)
    except MoeeError as error:
        parser.exit(2, f"fine_tuning: {error}\n")
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_inputs(parser)
    add("--training", default="bundled", help="folder of class folders to train on")
    add("--limit", type=int, help="images to train on; else all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--points", type=Point.parsed, nargs="+", default=[Point(0.36, 0.32)])
    add("--systems", nargs="+", default=["best", "fisher OBS, CLS apart"], choices=SYSTEMS)
    add_options(parser, "finetune", settings(FinetuneConfig, TUNED))
    add("--store", type=Path, help="store of recordings and runs; else the user's own")
    add("--out", type=Path, default=Path("reports/fine_tuning"))
    return parser


if __name__ == "__main__":
    main()
