"""MoE Jetpack against the other ways to start, trained longer than a notebook can.

``python benchmarks/jetpack.py`` trains what every start makes of a bundled model, with every seed,
on rendered scenes, and evaluates all on the held-out ones. It writes ``jetpack.json`` and ``.md``,
and for every part of the study its learning curves, ends and differences as ``.csv`` and ``.png``.
What the store holds is not trained again: a study that was stopped goes on.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import pandas as pd
import torch
from common import Row

from moee_analysis import measure, plots
from moee_analysis.baselines.jetpack_study import JETPACK, PRETRAINED, JetpackStudy
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.measure import Trainings
from moee_analysis.models.loading import BUNDLED, architecture, load_model
from moee_analysis.training.config import SupervisedConfig

Write = Callable[[str, Any, pd.DataFrame], None]

PARTS = ("components", "methods", "core_shares", "sizes")
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

    Images that are trained on and evaluated are refused, and models that cannot be narrowed.
    """
    trained = {part: task.trained(study, part, store) for part in parts}
    out.mkdir(parents=True, exist_ok=True)
    write = partial(_save, out, task.told(study))
    tables = {part: _write_part(write, part, found, task) for part, found in trained.items()}
    with_jetpack = [found for found in trained.values() if JETPACK in found.starts]
    if with_jetpack:
        _contributions(write, study, task, with_jetpack[0])
    caption = f"{task.told(study)} {trained[parts[0]].caption}"
    texts = [f"## {part.replace('_', ' ')}\n\n{text_of(t)}" for part, t in tables.items()]
    rows = {part: _plain(table) for part, table in tables.items()}
    facts = {
        "recipe": asdict(task.recipe), "seeds": list(task.seeds), "caption": caption,
        "successor": asdict(study.jetpack_config()), **common.circumstances(),
    }  # fmt: skip
    text = "\n\n".join([*texts, caption]) + "\n"
    common.write_files(out, "jetpack", {"facts": facts, "rows": rows}, text, None)


def _write_part(write: Write, part: str, trained: Trainings, task: Task) -> pd.DataFrame:
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


def _save(out: Path, told: str, name: str, plot: Any, table: pd.DataFrame) -> None:
    table.to_csv(out / f"{name}.csv", index=False)
    plot(table, caption=f"{told} {table.attrs['caption']}").savefig(out / f"{name}.png")


def _plain(table: pd.DataFrame) -> list[Row]:
    """Rows as JSON can hold them: null where a level is never reached."""
    known = table.replace([np.inf, -np.inf], np.nan).astype(object)
    return known.where(known.notna(), None).to_dict("records")


def text_of(table: pd.DataFrame) -> str:
    """A line for every start."""
    header = [
        "start", "top-1 (%)", "of single seeds (%)", f"images to {table['level'].iloc[0]:.0%}",
        "MMACs", "parameters (10^3)",
    ]  # fmt: skip
    lines = [
        [
            row["start"], common.interval(row, "top1", "low", "high"),
            f"{100 * row['worst']:.1f} to {100 * row['best']:.1f}",
            "never" if pd.isna(row["images"]) else f"{row['images']:.0f}",
            f"{row['macs'] / 1e6:.2f}", f"{row['params'] / 1e3:.0f}",
        ]
        for row in table.to_dict("records")
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and say where the files are."""
    parser = common.parser_of("jetpack", __doc__, "--store", out="reports/jetpack")
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
    with common.command(parser, argv) as asked:
        given = {name: getattr(asked, name) for name in RECIPE}
        recipe = SupervisedConfig(**{name: v for name, v in given.items() if v is not None})
        calibration = load_images(split="calibration", limit=asked.calibration)
        study = JetpackStudy(
            load_model(asked.model), calibration, width=asked.width, store=asked.store
        )
        sets = load_images(split="train"), load_images()
        if asked.classes:
            sets = tuple(each.of_classes(asked.classes) for each in sets)
        training, images = sets[0].limit(asked.limit), sets[1].limit(asked.evaluated)
        task = Task(training, images, recipe, asked.seeds, workers=asked.workers)
        run(study, task, parts=asked.parts, store=asked.store, out=asked.out)


if __name__ == "__main__":
    main()
