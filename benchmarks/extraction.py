"""How long an extraction takes, stage by stage, as a multiple of one plain forward pass.

``python benchmarks/extraction.py`` takes a model apart on more and more calibration images, by
each recipe, nothing stored before, each time in a process of its own that also runs the dense model
once over the same images. It writes ``extraction.json``, ``.md`` and ``.png`` after every size.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from clustering import apart
from extraction_tables import as_text, write

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.presets import PRESETS
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.calibration_set import calibration_of
from moee_analysis.extraction.record.memory_estimate import expected
from moee_analysis.extraction.record.recording import BATCH
from moee_analysis.models.loading import architecture, fingerprint, load_model
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moee_analysis.data.images import ImageSet

    Row = dict[str, Any]

STAGES = {
    "recording": ("recording.py", ("_record_into",)),
    "drawing": ("draws.py", ("add",)),
    "clustering": ("clusters_to_router.py", ("cluster_tokens",)),
    "statistics": ("statistics.py", ("add",)),
    "elimination": ("scoring.py", ("eliminated",)),
    "attention": ("attention_modes.py", ("attention_modes",)),
    "sizing": ("sizing.py", ("sized",)),
    "coherence": ("coherence.py", ("add",)),
    "refit": ("refit.py", ("add", "shared_readout")),
}
"""Functions in which the time of each stage is spent; what is left is ``other``."""


@dataclass(frozen=True)
class Task:
    """One extraction: of which model, from how many images, by which recipe."""

    model: str
    weights: str | None
    images: str
    size: int
    recipe: str
    settings: Settings


@dataclass(frozen=True)
class Settings:
    """What is the same for all extractions."""

    macs_reduction: float
    preset: str
    seed: int


def run(tasks: Sequence[Task], out: Path) -> list[Row]:
    """Measure all ``tasks``, and write the files of ``out`` after each.

    Raises
    ------
    MoeeError
        Model, weights or images that cannot be loaded; fewer images than are asked for.
    """
    rows: list[Row] = []
    facts = apart(facts_of, tasks[-1]) | _circumstances()
    out.mkdir(parents=True, exist_ok=True)
    for task in tasks:
        rows.append(apart(measured, task))
        print(as_text(rows[-1]), flush=True)
        write(out, facts, rows)
    return rows


def measured(task: Task) -> Row:
    """Seconds of the plain pass and of every stage, bytes that were expected and used."""
    model, images = _loaded(task)
    plain = [plain_pass(model, images)]
    config = config_of(task)
    with tempfile.TemporaryDirectory() as store:
        calibration = calibration_of(model, images, config.resolved(), root=Path(store))
        told, before = expected(calibration).total, _peak()
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
        "stages": stages, "disk": disk, "peak": _peak() - before, "told": told,
    }  # fmt: skip


def config_of(task: Task) -> ExtractConfig:
    """Settings of an extraction from all images of a task."""
    return ExtractConfig(recipe=task.recipe, calibration_images=task.size, **asdict(task.settings))


def plain_pass(model: nn.Module, images: ImageSet) -> float:
    """Seconds of one pass of the dense model over ``images``, decoding them included."""
    start = time.perf_counter()
    with torch.inference_mode():
        for batch in images.batches(model, batch_size=BATCH):
            model(batch)
    return time.perf_counter() - start


def stage_seconds(profile: cProfile.Profile) -> dict[str, float]:
    """Seconds of every stage that took any."""
    functions = pstats.Stats(profile).stats
    found = {}
    for stage, (file, names) in STAGES.items():
        own = [
            cumulative
            for (path, _, name), (_, _, _, cumulative, _) in functions.items()
            if Path(path).name == file and name in names
        ]
        if sum(own) > 0:
            found[stage] = float(sum(own))
    return found


def _peak() -> float:
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def facts_of(task: Task) -> Row:
    """What is taken apart, on what."""
    model, images = _loaded(task)
    return {
        "model": {"name": architecture(model), "weights": fingerprint(model)[:12]},
        "images": images.name,
        **asdict(task.settings),
    }


def _loaded(task: Task) -> tuple[nn.Module, ImageSet]:
    model = load_model(task.model, weights=task.weights)
    images = load_images(task.images, split="calibration")
    if len(images) < task.size:
        raise MoeeError(f"{task.size} images", f"{len(images)} in '{images.name}'", "ask for fewer")
    return model, images.limit(task.size, seed=task.settings.seed)


def _circumstances() -> Row:
    today = datetime.now(tz=UTC).date().isoformat()
    machine, threads = describe_device("cpu"), torch.get_num_threads()
    return {"date": today, "machine": machine, "threads": threads, "versions": versions()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    given = (options.model, options.weights, options.calibration)
    settings = Settings(options.macs_reduction, options.preset, options.seed)
    tasks = [
        Task(*given, size, recipe, settings)
        for size in sorted(options.sizes)
        for recipe in options.recipe
    ]
    try:
        run(tasks, options.out)
    except MoeeError as error:
        parser.exit(2, f"extraction: {error}\n")
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="bundled", help="'bundled' or a timm model name")
    add("--weights", help="a local .safetensors or .pth state dict")
    add("--calibration", default="bundled", help="folder of class folders")
    add("--sizes", type=int, nargs="+", default=(250, 500, 1000), help="numbers of images")
    add("--recipe", nargs="+", default=("best", "paper"), choices=("best", "paper"))
    add("--preset", default="small", choices=PRESETS)
    add("--macs-reduction", type=float, default=0.28, help="share of the dense MACs to save")
    add("--seed", type=int, default=0)
    add("--out", type=Path, default=Path("docs/speed"))
    return parser


if __name__ == "__main__":
    main()
