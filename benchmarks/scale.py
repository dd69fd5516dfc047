"""What an extraction takes on the full ImageNet train set: time, memory, disk and traffic.

``python benchmarks/scale.py`` measures seconds for an image on this machine, with a model of random
weights (how long it takes does not depend on them), and works out the rest: sizes follow from the
shapes of all that is added up. It writes ``scale.json`` and ``scale.md``.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import resource
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from extraction import plain_pass
from scale_tables import write

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.assignment import Assignment
from moee_analysis.extraction.cluster.clusters_to_router import Partition
from moee_analysis.extraction.cluster.sample_tokens import SampleTally
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.recipes import recipe_named
from moee_analysis.extraction.cross_token_fisher import IMAGES
from moee_analysis.extraction.experts.expert_statistics import ExpertTally
from moee_analysis.extraction.experts.refit_w2 import RefitTally
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.accumulate import size_of, that_fit
from moee_analysis.extraction.record.calibration_set import PART, Calibration, Limits
from moee_analysis.extraction.record.memory_estimate import expected
from moee_analysis.models.macs import count
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moee_analysis.data.images import ImageSet

    Row = dict[str, Any]

NOTHING_KEPT = Limits(disk=0)
SUMS = {
    "drawing": ("draws.py", "add"),
    "statistics": ("statistics.py", "add"),
    "coherence": ("coherence.py", "add"),
    "refit": ("refit.py", "add"),
}


def measured(model: nn.Module, images: ImageSet, config: ExtractConfig) -> Row:
    """Seconds of one image in every kind of pass, and of clustering a layer."""
    forward = plain_pass(model, images)
    profile = cProfile.Profile()
    profile.runcall(extract, model, images, config, limits=NOTHING_KEPT)
    spent = {
        (Path(path).name, name): (calls, cumulative)
        for (path, _, name), (calls, _, _, cumulative, _) in pstats.Stats(profile).stats.items()
    }
    sums = {stage: spent[where][1] for stage, where in SUMS.items()}
    clusterings, clustering = spent["clusters_to_router.py", "cluster_tokens"]
    # three passes with gradients and one without run the model
    runs = spent["recording.py", "held"][1]
    return {
        "images": len(images), "forward": forward / len(images),
        "gradients": (runs - forward) / 3 / len(images),
        **{f"sums of {stage}": seconds / len(images) for stage, seconds in sums.items()},
        "clustering of a layer": clustering / clusterings,
        "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }  # fmt: skip


def sizes(model: nn.Module, images: ImageSet, config: ExtractConfig) -> Row:
    """What the model costs, and bytes: of an image's tokens, of memory, of the sums of a pass."""
    with tempfile.TemporaryDirectory() as folder:
        calibration = Calibration(model, images, config.resolved(), Path(folder), NOTHING_KEPT)
        memory = expected(calibration)
        tallies = tallies_of(calibration)
        sums = {name: sum(map(size_of, own)) for name, own in tallies.items()}
        room = calibration.limits.memory
        passes = {name: len(that_fit(own, room)) for name, own in tallies.items()}
        tokens = calibration.bytes_of(1)
    dense = count(model)
    return {
        "macs": dense.total, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(calibration.sites), "dim": calibration.sites[0].dim,
        "hidden": calibration.sites[0].hidden,
        "tokens": tokens, "memory": vars(memory), "sums": sums, "passes": passes,
    }  # fmt: skip


def tallies_of(calibration: Calibration) -> dict[str, list[Any]]:
    """What the passes add up, of the shapes of a real run: every layer with all its experts."""
    config, found = calibration.config, {"drawing": [], "statistics": [], "refit": []}
    for site in calibration.sites:
        experts = config.clustering.for_width(site.hidden).count
        assignment = Assignment((0,), Partition(centres=np.zeros((experts, 1), np.float32)))
        shape = (experts + 1, site.hidden)
        nothing = np.zeros(shape)
        found["drawing"].append(
            SampleTally(site, np.arange(config.cluster_tokens), 1, gradients=True)
        )
        found["statistics"].append(ExpertTally(site, assignment, gradients=True))
        found["refit"].append(
            RefitTally(site, assignment, nothing.astype(bool), nothing, nothing[:, 0])
        )
    return found


def run(models: Sequence[str], images: ImageSet, out: Path, *, experts: int) -> None:
    """Measure the first of the ``models``, work out all of them, and write the files of ``out``."""
    clustering = replace(recipe_named("best")["clustering"], count=experts)
    config = ExtractConfig(recipe="best", macs_reduction=0.28, clustering=clustering)
    known, speed = {}, {}
    for name in models:
        model = timm.create_model(name).eval().requires_grad_(requires_grad=False)
        known[name] = sizes(model, images, config)
        if not speed:
            speed = measured(model, images, config)
        del model
    facts = {
        "measured": models[0], "experts": experts, "part": PART, "looked_at": IMAGES,
        "date": datetime.now(tz=UTC).date().isoformat(), "machine": describe_device("cpu"),
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write(out, facts, speed, known)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    started = time.perf_counter()
    try:
        images = load_images(options.calibration, split="calibration", limit=options.images)
        run(options.models, images, options.out, experts=options.experts)
    except MoeeError as error:
        parser.exit(2, f"scale: {error}\n")
    print(f"written to {options.out} in {time.perf_counter() - started:.0f} s")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", default=("deit_base_patch16_224", "vit_huge_patch14_224"))
    add("--calibration", default="bundled", help="folder of class folders")
    add("--images", type=int, default=64, help="images that are measured")
    add("--experts", type=int, default=16, help="of every layer")
    add("--out", type=Path, default=Path("docs/speed"))
    return parser


if __name__ == "__main__":
    main()
