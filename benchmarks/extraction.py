"""How long an extraction takes, stage by stage, as a multiple of one plain forward pass.

``python benchmarks/extraction.py`` takes a model apart on more and more calibration images, by
each recipe, nothing stored before, each time in a process of its own that also runs the dense model
once over the same images. It writes ``extraction.json``, ``.md`` and ``.png`` after every size.
"""

import cProfile
import pstats
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import common
import pandas as pd
import torch
from common import Row
from figures import extraction_time
from torch import nn

from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.recording import BATCH
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.loading import architecture, load_model

STAGES = {
    "recording": ("recording.py", ("_record_into",)),
    "drawing": ("sample_tokens.py", ("update",)),
    "clustering": ("clusters_to_router.py", ("cluster_tokens",)),
    "statistics": ("layer_experts.py", ("update",)),
    "elimination": ("neuron_scores.py", ("removal_costs",)),
    "attention": ("attention.py", ("attention_modes",)),
    "sizing": ("budget.py", ("allocate",)),
    "coherence": ("cross_token_fisher.py", ("update",)),
    "refit": ("refit_w2.py", ("update", "shared_readout")),
}
"""Functions in which the time of each stage is spent; what is left is ``other``."""


@dataclass(frozen=True)
class Task:
    """One extraction: of which model, from how many images, by which recipe and settings."""

    model: str
    weights: str | None
    images: str
    size: int
    recipe: str
    settings: dict[str, Any]


def run(tasks: Sequence[Task], out: Path) -> list[Row]:
    """Measure all ``tasks``, and write the files of ``out`` after each.

    Model, weights or images that cannot be loaded are refused, and fewer images than asked for.
    """
    rows: list[Row] = []
    facts = common.in_process(facts_of, tasks[-1]) | common.circumstances()
    for task in tasks:
        rows.append(common.in_process(measure, task))
        print(as_text(rows[-1]), flush=True)
        write(out, facts, rows)
    return rows


def measure(task: Task) -> Row:
    """Seconds of the plain pass and of every stage, bytes that were used."""
    model, images = _loaded(task)
    plain = [plain_pass(model, images)]
    config = config_of(task)
    with tempfile.TemporaryDirectory() as store:
        before = common.peak_bytes()
        profile, start = cProfile.Profile(), time.perf_counter()
        profile.runcall(extract, model, images, config, store=store)
        seconds = time.perf_counter() - start
        disk = sum(path.stat().st_size for path in Path(store).rglob("*") if path.is_file())
    plain.append(plain_pass(model, images))
    stages = stage_seconds(profile)
    stages["other"] = max(seconds - sum(stages.values()), 0.0)
    return {
        "recipe": task.recipe, "images": task.size, "seconds": seconds,
        "plain": sum(plain) / len(plain), "times": seconds * len(plain) / sum(plain),
        "stages": stages, "disk": disk, "peak": common.peak_bytes() - before,
    }  # fmt: skip


def config_of(task: Task) -> ExtractConfig:
    """Settings of an extraction from all images of a task."""
    return ExtractConfig(recipe=task.recipe, calibration_images=task.size, **task.settings)


def plain_pass(model: nn.Module, images: ImageSet) -> float:
    """Seconds of one pass of the dense model over ``images``, decoding them included."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in images.batches(model, batch_size=BATCH):
            model(batch)
    return time.perf_counter() - start


def stage_seconds(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds of every stage that took any."""
    seconds: Counter[tuple[str, str]] = Counter()
    for (path, _, name), (_, _, _, cumulative, _) in pstats.Stats(profile).stats.items():
        seconds[Path(path).name, name] += cumulative
    return {
        stage: float(spent)
        for stage, (file, names) in STAGES.items()
        if (spent := sum(seconds[file, name] for name in names))
    }


def facts_of(task: Task) -> Row:
    """What is taken apart, on what."""
    model, images = _loaded(task)
    return {
        "model": {"name": architecture(model), "weights": fingerprint(model)[:12]},
        "images": images.name, **task.settings,
    }  # fmt: skip


def _loaded(task: Task) -> tuple[nn.Module, ImageSet]:
    model = load_model(task.model, weights=task.weights)
    images = load_images(task.images, split="calibration")
    if len(images) < task.size:
        raise MoeeError(f"{task.size} images", f"{len(images)} in '{images.name}'", "ask for fewer")
    return model, images.limit(task.size, seed=task.settings["seed"])


# The files


def write(out: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    caption, content = _caption(facts), {"facts": facts, "rows": list(rows)}
    figure = extraction_time(for_figure(rows), caption=caption)
    common.write_files(out, "extraction", content, f"{_table(rows)}\n\n{caption}\n", figure)


def for_figure(rows: Sequence[Row]) -> pd.DataFrame:
    """A row for each stage: how many plain forward passes it took."""
    return pd.DataFrame(
        {"recipe": row["recipe"], "images": row["images"], "stage": stage,
         "passes": seconds / row["plain"]}
        for row in rows
        for stage, seconds in row["stages"].items()
    )  # fmt: skip


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    return (
        f"{row['recipe']}, {row['images']} images: {row['seconds']:.0f} s, {row['times']:.1f} "
        f"times a plain pass of {row['plain']:.0f} s; {row['peak'] / 1e9:.1f} GB, "
        f"{row['disk'] / 1e9:.1f} GB on disk"
    )


def _table(rows: Sequence[Row]) -> str:
    """One line for each extraction; stages in per cent of its time."""
    stages = list(dict.fromkeys(stage for row in rows for stage in row["stages"]))
    stages.sort(key="other".__eq__)
    header = ["recipe", "images", "plain pass (s)", "extraction (s)", "times the pass"]
    header += [f"{stage} (%)" for stage in stages]
    header += ["memory (GB)", "disk (GB)"]
    return common.as_markdown(header, [_line(row, stages) for row in rows])


def _line(row: Row, stages: Sequence[str]) -> list[str]:
    shares = [row["stages"].get(stage, 0.0) / row["seconds"] for stage in stages]
    sizes = [f"{row[name] / 1e9:.1f}" for name in ("peak", "disk")]
    return [
        row["recipe"], str(row["images"]), f"{row['plain']:.1f}", f"{row['seconds']:.1f}",
        f"{row['times']:.1f}", *(f"{100 * share:.0f}" for share in shares), *sizes,
    ]  # fmt: skip


def _caption(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    return (
        f"Extraction of {facts['model']['name']}, preset {facts['preset']}, "
        f"−{facts['macs_reduction']:.0%} MACs, calibrated on {facts['images']}, "
        f"seed {facts['seed']}, nothing stored before; each once, in a process of its "
        "own. A plain pass is one of the dense model over the same "
        "images, decoding included, the mean of one before and one after. Memory is the largest of "
        f"the process beyond what it had before the extraction. {facts['date']}, "
        f"{facts['machine']}, {facts['threads']} threads, torch {facts['versions']['torch']}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.MODEL, "--calibration", "--preset", "--seed")
    parser = common.parser_of("extraction", __doc__, *options, out="docs/speed")
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=(250, 500, 1000), help="numbers of images")
    add("--recipe", nargs="+", default=("best", "paper"), choices=("best", "paper"))
    add("--macs-reduction", type=float, default=0.28, help="share of the dense MACs to save")
    with common.command(parser, argv) as asked:
        given = asked.model, asked.weights, asked.calibration
        settings = {name: getattr(asked, name) for name in ("macs_reduction", "preset", "seed")}
        pairs = product(sorted(asked.sizes), asked.recipe)
        run([Task(*given, size, recipe, settings) for size, recipe in pairs], asked.out)


if __name__ == "__main__":
    main()
