"""MoE Jetpack against the other ways to start, trained longer than a notebook can.

``python benchmarks/jetpack.py`` trains what every start makes of a bundled model, with every seed,
on rendered scenes, and evaluates all on the held-out ones. It writes ``jetpack.json`` and ``.md``,
and for every part of the study its learning curves, ends and differences as ``.csv`` and ``.png``.
What the store holds is not trained again: a study that was stopped goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from moee_analysis import measure, plots
from moee_analysis.baselines.jetpack_study import JETPACK, PRETRAINED, JetpackStudy
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import BUNDLED, architecture, load_model
from moee_analysis.training.supervised_config import SupervisedConfig
from moee_analysis.utils.paths import store_folder
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from moee_analysis.data.images import ImageSet
    from moee_analysis.measure import Trainings

    Write = Callable[[str, Any, pd.DataFrame], None]

PARTS = ("components", "methods", "core_shares", "sizes")
HEAD = """\
| start | top-1 (%) | of single seeds (%) | images to {level:.0%} | MMACs | parameters (10^3) |
|---|---|---|---|---|---|"""
RECIPE = {
    "steps": int, "batch_size": int, "learning_rate": float, "layer_decay": float, "mixup": float,
    "cutmix": float, "augmentation": str, "check_every": int,
}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """What is learned: images to train on and others to evaluate, by this recipe."""

    training: ImageSet
    images: ImageSet
    recipe: SupervisedConfig
    seeds: Sequence[int]
    resamples: int = 2000
    workers: int = 1

    def told(self, study: JetpackStudy) -> str:
        """What all captions begin with."""
        classes = ", ".join(dict.fromkeys(self.images.folders))
        width = study.jetpack_config().width
        name = architecture(study.dense)
        return f"Successors of width {width} of the model '{name}' learn {classes}."

    def trained(self, study: JetpackStudy, part: str, store: Path) -> Trainings:
        """Train every start of a part of the study."""
        return measure.trainings(
            getattr(study, part)(), self.training, self.images, self.recipe, seeds=self.seeds,
            store=store, workers=self.workers,
        )  # fmt: skip


def run(study: JetpackStudy, task: Task, *, parts: Sequence[str], store: Path, out: Path) -> None:
    """Train, evaluate, and write the files in the folder ``out``.

    Raises
    ------
    MoeeError
        Images that are trained on and evaluated; a model that cannot be narrowed.
    """
    trained = {part: task.trained(study, part, store) for part in parts}
    out.mkdir(parents=True, exist_ok=True)
    write = partial(_kept, out, task.told(study))
    tables = {part: _written(write, part, found, task) for part, found in trained.items()}
    with_jetpack = [found for found in trained.values() if JETPACK in found.starts]
    if with_jetpack:
        _contributions(write, study, task, with_jetpack[0])
    caption = f"{task.told(study)} {trained[parts[0]].caption}"
    texts = [f"## {part.replace('_', ' ')}\n\n{as_markdown(t)}" for part, t in tables.items()]
    (out / "jetpack.md").write_text("\n\n".join([*texts, caption]) + "\n")
    rows = {part: _plain(table) for part, table in tables.items()}
    facts = {
        "recipe": asdict(task.recipe), "seeds": list(task.seeds), "caption": caption,
        "successor": asdict(study.jetpack_config()), "machine": describe_device("cpu"),
        "versions": versions(),
    }  # fmt: skip
    write_json(out / "jetpack.json", {"facts": facts, "rows": rows})


def _written(write: Write, part: str, trained: Trainings, task: Task) -> pd.DataFrame:
    """Write curves, ends and differences of one part; return the ends."""
    level = None
    if PRETRAINED in trained.starts:
        level = float(trained.right[trained.starts.index(PRETRAINED), :, -1].mean())
    drawn = {"resamples": task.resamples}
    ends = measure.learned(trained, level=level, **drawn)
    write(f"{part}_curves", plots.learning_curves, measure.learning_curves(trained, **drawn))
    write(f"{part}_ends", plots.learned, ends)
    pairs = measure.which_beats_which(trained, **drawn)
    write(f"{part}_differences", plots.which_beats_which, pairs)
    return ends


def _contributions(write: Write, study: JetpackStudy, task: Task, trained: Trainings) -> None:
    tables = [
        measure.contributions(
            trained.trained(JETPACK, seed, study.jetpack()(seed)), task.images
        ).assign(seed=seed)
        for seed in task.seeds
    ]
    table = pd.concat(tables, ignore_index=True)
    table.attrs["caption"] = (
        f"MoE Jetpack, {len(task.images)} images: means over all tokens; "
        f"bands are the range of {len(task.seeds)} seeds."
    )
    write("contributions", plots.contributions, table)


def _kept(out: Path, told: str, name: str, plot: Any, table: pd.DataFrame) -> None:
    table.to_csv(out / f"{name}.csv", index=False)
    plot(table, caption=f"{told} {table.attrs['caption']}").savefig(out / f"{name}.png")


def _plain(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows as JSON can hold them: null where a level is never reached."""
    known = table.replace([np.inf, -np.inf], np.nan).astype(object)
    return known.where(known.notna(), None).to_dict("records")


def as_markdown(table: pd.DataFrame) -> str:
    """A line for every start."""
    lines = [HEAD.format(level=table["level"].iloc[0])]
    for row in table.itertuples():
        needed = "never" if pd.isna(row.images) else f"{row.images:.0f}"
        lines.append(
            f"| {row.start} | {100 * row.top1:.1f} ({100 * row.low:.1f} to {100 * row.high:.1f}) | "
            f"{100 * row.worst:.1f} to {100 * row.best:.1f} | {needed} | {row.macs / 1e6:.2f} | "
            f"{row.params / 1e3:.0f} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    store = options.store or store_folder()
    given = {name: getattr(options, name) for name in RECIPE}
    try:
        recipe = SupervisedConfig(**{name: v for name, v in given.items() if v is not None})
        dense = load_model(options.model)
        calibration = load_images(split="calibration", limit=options.calibration)
        study = JetpackStudy(dense, calibration, width=options.width, store=store)
        sets = load_images(split="train"), load_images()
        if options.classes:
            sets = tuple(each.of_classes(options.classes) for each in sets)
        training, images = sets[0].limit(options.limit), sets[1].limit(options.evaluated)
        task = Task(training, images, recipe, options.seeds, workers=options.workers)
        run(study, task, parts=options.parts, store=store, out=options.out)
    except MoeeError as error:
        parser.exit(2, f"jetpack: {error}\n")
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default=BUNDLED, help="the predecessor: bundled or bundled_convnext")
    add("--width", type=int, help="channels of the successors; else half of its own")
    add("--classes", nargs="*", help="classes of the scenes to learn; else all")
    add("--calibration", type=int, help="calibration images; else all")
    add("--limit", type=int, help="scenes to train on; else all")
    add("--evaluated", type=int, help="scenes to evaluate; else all")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add("--workers", type=int, default=torch.get_num_threads(), help="processes that train")
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    for name, kind in RECIPE.items():
        add(f"--{name.replace('_', '-')}", type=kind, help="as in SupervisedConfig")
    add("--store", type=Path, help="store of trainings; else the user's own")
    add("--out", type=Path, default=Path("reports/jetpack"))
    return parser


if __name__ == "__main__":
    main()
