"""What a run would cost here: seconds of a few measured products, times ratios found elsewhere."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from moee_analysis.data.images import ImageSet, Scenes
from moee_analysis.data.scenes.scene import SPLIT_SIZES
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.memory_estimate import expected
from moee_analysis.extraction.record.recording import BATCH
from moee_analysis.models.loading import BUNDLED_MODELS, architecture, blank
from moee_analysis.utils.checks import whole_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

RECIPES = ("paper", "best")
PASSES = {"paper": 1.3, "best": 7.5}
"""An extraction takes so many plain passes over its images (docs/speed/extraction.md)."""

START = 5.0  # seconds that no number of images changes, loading the libraries among them
SCATTERED = 1_000_000
SCATTERS = 0.38
"""UMAP and HDBSCAN take so many scattered sums of a million numbers for a token of a layer."""

REPORTS = {"smoke": 55.0, "small": 170.0}
"""A report on a bundled model takes as long as so many ``best`` extractions of its preset."""

REPORT_DISK = 4.0  # times what one of them keeps; its store holds all that the notebooks share

ENOUGH = 1.0  # seconds of measuring after which more images would tell little
MANY = 128  # images, at most


@dataclass(frozen=True)
class Speed:
    """Seconds measured here: to draw a scene, for an image's pass, for a scattered sum."""

    scene: float
    image: float
    scatter: float


@dataclass(frozen=True)
class Cost:
    """About what a run takes: seconds, and bytes of memory and disk."""

    run: str
    seconds: float
    memory: float
    disk: float


@dataclass(frozen=True)
class Costs:
    """Estimates for the runs of one model on so many images, and the speed they follow from."""

    model: str
    images: int
    preset: str
    speed: Speed
    runs: tuple[Cost, ...]


def speed_of(model: nn.Module) -> Speed:
    """Measure for some seconds, with the scenes as pictures."""
    size, seen, scene, image = 8, 0, 0.0, 0.0
    with torch.inference_mode():
        model(blank(model, images=BATCH))  # whoever comes first waits for memory
        while image < ENOUGH and size <= MANY:
            scenes = _scenes(range(seen, seen + size))
            scene = _seconds(lambda s=scenes: [s.picture(i) for i in range(len(s))])
            image = _seconds(
                lambda s=scenes: [model(x) for x in s.batches(model, batch_size=BATCH)]
            )
            seen, size = seen + size, 4 * size
    numbers = np.random.default_rng(0).integers(0, SCATTERED, SCATTERED)
    weights = np.ones(SCATTERED)
    scatter = [_seconds(lambda: np.bincount(numbers, weights, SCATTERED)) for _ in range(20)]
    return Speed(scene / len(scenes), image / len(scenes), statistics.median(scatter))


def costs_of(model: nn.Module, speed: Speed, *, images: int | None, preset: str) -> Costs:
    """Estimate what extractions of ``model`` would cost, and a report where one was measured.

    Raises
    ------
    MoeeError
        No images; an unknown preset; no MLPs that can be taken apart.
    """
    if images is not None:
        whole_number("images", images)
    sizes = preset_named(preset)
    there = images or sizes.calibration_images or SPLIT_SIZES["calibration"]
    count = min(there, sizes.calibration_images or there)
    runs = [_extraction(model, speed, recipe, count=count, preset=preset) for recipe in RECIPES]
    if preset in REPORTS and architecture(model) in BUNDLED_MODELS:
        best = runs[-1]
        seconds = REPORTS[preset] * best.seconds
        runs.append(replace(best, run="report", seconds=seconds, disk=REPORT_DISK * best.disk))
    return Costs(architecture(model), count, preset, speed, tuple(runs))


def _extraction(model: nn.Module, speed: Speed, recipe: str, *, count: int, preset: str) -> Cost:
    """What one extraction takes; nothing is run but a single image."""
    config = ExtractConfig(recipe=recipe, preset=preset, calibration_images=count).resolved()
    calibration = Calibration(model, _scenes(range(count)), config, Path())
    seconds = START + count * (speed.scene + PASSES[recipe] * speed.image)
    if config.clustering.reduce == "umap":
        rows = [min(config.cluster_tokens, n * count) for n in calibration.kept_per_image.values()]
        seconds += SCATTERS * speed.scatter * sum(rows)
    held = psutil.Process().memory_info().rss
    memory = held + expected(calibration).total
    return Cost(f"extract --recipe {recipe}", seconds, memory, calibration.bytes_of(count))


def _scenes(rows: range) -> ImageSet:
    """Scenes of the calibration split, any number of them; drawn when they are looked at."""
    return ImageSet("scenes", Scenes("calibration"), tuple(rows), ("",) * len(rows))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
