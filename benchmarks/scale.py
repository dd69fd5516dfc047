"""What an extraction takes on the full ImageNet train set: time, memory, disk and traffic.

``python benchmarks/scale.py`` measures seconds for an image on this machine, with a model of random
weights (how long it takes does not depend on them), and works out the rest: sizes follow from the
shapes of all that is added up. It writes ``scale.json`` and ``scale.md``.
"""

import cProfile
import math
import pstats
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import numpy as np
import timm
from common import Row
from extraction import plain_pass
from torch import nn

from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.extraction.cluster.clusters_to_router import Assignment, Partition
from moee_analysis.extraction.cluster.sample_tokens import SampleAccumulator
from moee_analysis.extraction.config import ExtractConfig, recipe_named
from moee_analysis.extraction.cross_token_fisher import IMAGES
from moee_analysis.extraction.experts.layer_experts import StatisticsAccumulator
from moee_analysis.extraction.experts.refit_w2 import RefitAccumulator
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.accumulate import groups_that_fit, size_of
from moee_analysis.extraction.record.token_source import (
    PART,
    Limits,
    TokenSource,
    calibration_tokens,
)
from moee_analysis.models.macs import count

IMAGENET = 1_281_167  # images of the train set
PROCESSES = (1, 8, 64)
ASSUMED = 1e13  # MACs a second of one GPU in single precision; nothing here has measured one
NOTHING_KEPT = Limits(disk=0)
SUMS = {
    "drawing": ("sample_tokens.py", "update"),
    "statistics": ("layer_experts.py", "update"),
    "coherence": ("cross_token_fisher.py", "update"),
    "refit": ("refit_w2.py", "update"),
}


def measure(model: nn.Module, images: ImageSet, config: ExtractConfig) -> Row:
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
    runs = spent["recording.py", "in_memory"][1]
    return {
        "images": len(images), "forward": forward / len(images),
        "gradients": (runs - forward) / 3 / len(images),
        **{f"sums of {stage}": seconds / len(images) for stage, seconds in sums.items()},
        "clustering of a layer": clustering / clusterings,
        "peak": common.peak_bytes(),
    }  # fmt: skip


def sizes(model: nn.Module, images: ImageSet, config: ExtractConfig) -> Row:
    """What the model costs, and bytes: of an image's tokens, of memory, of the sums of a pass."""
    with tempfile.TemporaryDirectory() as folder:
        config, root = config.resolved(), Path(folder)
        calibration = calibration_tokens(model, images, config, root=root, limits=NOTHING_KEPT)
        tallies = tallies_of(calibration, config)
        sums = {name: sum(map(size_of, own)) for name, own in tallies.items()}
        room = calibration.limits.memory
        passes = {name: len(groups_that_fit(own, room)) for name, own in tallies.items()}
        tokens = calibration.whole.bytes // len(calibration.images)
    dense = count(model)
    weights = 2 * sum(p.numel() * p.element_size() for p in model.parameters())
    memory = {"weights": weights, "sums": max(min(each, room) for each in sums.values())}
    return {
        "macs": dense.total, "parameters": sum(p.numel() for p in model.parameters()),
        "layers": len(calibration.sites), "dim": calibration.sites[0].dim,
        "hidden": calibration.sites[0].hidden,
        "tokens": tokens, "memory": memory, "sums": sums, "passes": passes,
    }  # fmt: skip


def tallies_of(calibration: TokenSource, config: ExtractConfig) -> dict[str, list[Any]]:
    """What the passes add up, of the shapes of a real run: every layer with all its experts."""
    found = {"drawing": [], "statistics": [], "refit": []}
    for site in calibration.sites:
        experts = config.clustering.for_width(site.hidden).count
        assignment = Assignment((0,), Partition(centres=np.zeros((experts, 1), np.float32)))
        shape = (experts + 1, site.hidden)
        nothing = np.zeros(shape)
        found["drawing"].append(
            SampleAccumulator(site, np.arange(config.cluster_tokens), 1, gradients=True)
        )
        found["statistics"].append(StatisticsAccumulator(site, assignment, gradients=True))
        found["refit"].append(
            RefitAccumulator(site, assignment, nothing.astype(bool), nothing, nothing[:, 0])
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
            speed = measure(model, images, config)
        del model
    facts = {"measured": models[0], "experts": experts, "part": PART, "looked_at": IMAGES}
    facts |= common.circumstances()
    write(out, facts, speed, known)


# The files


def write(out: Path, facts: Row, speed: Row, known: dict[str, Row]) -> None:
    """Write both files into ``out``."""
    plans = {name: work_out(facts, speed, known, name) for name in known}
    content = {"facts": facts, "measured": speed, "sizes": known, "imagenet": plans}
    parts = [_measured_table(speed), _size_table(known), _time_table(plans), _caption(facts)]
    common.write_files(out, "scale", content, "\n\n".join(parts) + "\n", None)


def work_out(facts: Row, speed: Row, known: dict[str, Row], name: str) -> list[Row]:
    """Hours, gigabytes and traffic for one model, by the number of processes."""
    own, base = known[name], known[facts["measured"]]
    work = own["macs"] / base["macs"]
    # sums go with tokens times layers times dim, which the tokens' bytes do, the refit's squared
    wide = own["tokens"] / base["tokens"]
    square = wide * own["dim"] / base["dim"]
    looked_at = min(IMAGENET, facts["looked_at"] * facts["part"])
    passes = own["passes"]
    graded = (passes["drawing"] + passes["statistics"]) * IMAGENET + looked_at
    plain = passes["refit"] * IMAGENET
    model = work * (speed["gradients"] * graded + speed["forward"] * plain)
    sums = IMAGENET * wide * (speed["sums of drawing"] + speed["sums of statistics"])
    sums += IMAGENET * square * speed["sums of refit"]
    rate = base["macs"] / speed["forward"]
    return [
        {
            "processes": n,
            "hours_model": model / n / 3600,
            "hours_sums": sums / n / 3600,
            "seconds_clusters": math.ceil(own["layers"] / n) * speed["clustering of a layer"],
            "hours_gpu": (model + sums) * rate / ASSUMED / n / 3600,
            "memory": sum(own["memory"].values()),
            "sent": 2 * (n - 1) / n * sum(own["sums"].values()),
        }
        for n in PROCESSES
    ]


def _measured_table(speed: Row) -> str:
    """Seconds of an image, as they were measured."""
    names = ["forward", "gradients", *(name for name in speed if name.startswith("sums"))]
    lines = [[name, f"{speed[name]:.3f}"] for name in names]
    return common.as_markdown(["of one image", "seconds"], lines)


def _size_table(known: dict[str, Row]) -> str:
    """What every model costs, and bytes."""
    header = [
        "model", "GMACs", "M parameters", "tokens of an image (MB)", "weights (GB)",
        "sums (GB)", "memory (GB)", "passes",
    ]  # fmt: skip
    lines = [
        [
            name, f"{own['macs'] / 1e9:.1f}", f"{own['parameters'] / 1e6:.0f}",
            f"{own['tokens'] / 1e6:.1f}",
            *(f"{each / 1e9:.1f}" for each in own["memory"].values()),
            f"{sum(own['memory'].values()) / 1e9:.1f}",
            " + ".join(map(str, own["passes"].values())),
        ]
        for name, own in known.items()
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _time_table(plans: dict[str, list[Row]]) -> str:
    """Hours and traffic on the full train set."""
    header = [
        "model", "processes", "the model (h)", "sums (h)", "clustering (s)",
        "on GPUs, assumed (h)", "memory of each (GB)", "sent by each (GB)",
    ]  # fmt: skip
    lines = [
        [name, str(row["processes"]), f"{row['hours_model']:.0f}", f"{row['hours_sums']:.0f}",
         f"{row['seconds_clusters']:.1f}", f"{row['hours_gpu']:.2f}", f"{row['memory'] / 1e9:.1f}",
         f"{row['sent'] / 1e9:.1f}"]
        for name, rows in plans.items()
        for row in rows
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _caption(facts: Row) -> str:
    """What the numbers are of."""
    return (
        f"{facts['measured']}, random weights, recipe best, {facts['experts']} experts a layer, "
        f"no tokens on the disk; {facts['date']}, {facts['machine']}, {facts['threads']} threads, "
        f"torch {facts['versions']['torch']}. A process here has these two cores. Other models are "
        "scaled by their MACs, and their sums by tokens, layers and widths. For a GPU "
        f"{ASSUMED / 1e12:.0f} TMAC/s in single precision are assumed, for the model and the sums "
        "alike; no GPU was measured."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = common.parser_of("scale", __doc__, "--calibration", out="docs/speed")
    add = parser.add_argument
    add("--models", nargs="+", default=("deit_base_patch16_224", "vit_huge_patch14_224"))
    add("--images", type=int, default=64, help="images that are measured")
    add("--experts", type=int, default=16, help="of every layer")
    started = time.perf_counter()
    with common.command(parser, argv) as asked:
        images = load_images(asked.calibration, split="calibration", limit=asked.images)
        run(asked.models, images, asked.out, experts=asked.experts)
        print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
