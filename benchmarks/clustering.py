"""How long HDBSCAN takes: this package's spanning tree against hdbscan's default.

``python benchmarks/clustering.py`` clusters hidden activations of one layer, more and more tokens,
all tokens of all images equally likely, with both systems in turns, each time in a process of its
own. It writes ``clustering.json``, ``.md`` and ``.png`` after every size.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from clustering_tables import as_text, write

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.exact_hdbscan import label_tree
from moee_analysis.extraction.cluster.hdbscan_mst import find_neighbours, grow_tree
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Row = dict[str, Any]

SIZES = (1000, 2500, 5000, 10_000, 20_000, 40_000, 100_000)
WARM = 300  # points that are clustered before the clock starts
OURS, THEIRS = "products", "hdbscan"


@dataclass(frozen=True)
class Source:
    """Where activations are from, and in what order their tokens are drawn."""

    model: str
    weights: str | None
    images: str
    layer: int
    seed: int
    limit: int | None = None


@dataclass(frozen=True)
class Settings:
    """How points are clustered; ``min_cluster_size`` is a share of them."""

    min_samples: int = 10
    min_cluster_size: float = 0.01

    def size(self, points: int) -> int:
        """Points of the smallest cluster."""
        return max(2, round(self.min_cluster_size * points))


def run(
    source: Source,
    settings: Settings,
    *,
    sizes: Sequence[int],
    hdbscan_limit: int,
    out: Path,
) -> list[Row]:
    """Measure both systems at all ``sizes``, hdbscan up to its limit; write the files of ``out``.

    Raises
    ------
    MoeeError
        Model, weights or images that cannot be loaded; no such layer; too few tokens.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.npy"
        facts = apart(recorded, source, file, max(sizes)) | {"settings": vars(settings)}
        facts |= _circumstances()
        out.mkdir(parents=True, exist_ok=True)
        for size in sorted(sizes):
            new = [apart(measured, OURS, file, size, settings)]
            if size <= hdbscan_limit:
                new.append(apart(measured, THEIRS, file, size, settings))
            rows += compared(new)
            print("\n".join(as_text(row) for row in new), flush=True)
            write(out, facts, rows)
    return rows


def apart(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process: its peak of memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def recorded(source: Source, file: Path, count: int) -> Row:
    """Save ``count`` tokens of a layer's hidden activations, in random order; say what they are."""
    from moee_analysis.data.images import load_images
    from moee_analysis.extraction.record.hooks import TokenPlan
    from moee_analysis.extraction.record.recording import record
    from moee_analysis.models.loading import architecture, find_mlps, fingerprint, load_model

    model = load_model(source.model, weights=source.weights)
    images = load_images(source.images, split="calibration", limit=source.limit)
    sites = [site for site in find_mlps(model) if site.index == source.layer]
    if not sites:
        raise MoeeError("a layer of the model", str(source.layer), "count its layers from 0")
    plan = TokenPlan(None, prefix=0)
    with tempfile.TemporaryDirectory() as store:
        hidden = record(model, images, sites, plan=plan, root=Path(store)).layer(sites[0]).hidden
        if len(hidden) < count:
            raise MoeeError(
                f"{count} tokens", f"{len(hidden)} in {len(images)} images",
                "take more --images, or smaller --sizes",
            )  # fmt: skip
        rows = np.random.default_rng(source.seed).permutation(len(hidden))[:count]
        np.save(file, hidden[rows])
    return {
        "model": {"name": architecture(model), "sha256": fingerprint(model)},
        "images": {"name": images.name, "count": len(images), "sha256": images.fingerprint},
        "layer": sites[0].name,
        "dim": sites[0].hidden,
        "tokens": len(hidden),
        "seed": source.seed,
    }


def measured(system: str, file: Path, count: int, settings: Settings) -> Row:
    """Time one system on the first ``count`` points of ``file``, once, after it has warmed up."""
    points = np.load(file, mmap_mode="r")[:count].astype(np.float32)
    cluster = {OURS: _by_products, THEIRS: _by_hdbscan}[system]
    cluster(points[:WARM], settings)
    row = {"system": system, "tokens": count} | cluster(points, settings)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return row | {"peak_gb": peak * 1024 / 1e9}


def _by_products(points: np.ndarray, settings: Settings) -> Row:
    clock = [time.perf_counter()]
    neighbours = find_neighbours(points, settings.min_samples)
    clock.append(time.perf_counter())
    tree = grow_tree(neighbours)
    clock.append(time.perf_counter())
    labels = label_tree(tree, min_cluster_size=settings.size(len(points)))
    clock.append(time.perf_counter())
    stages = dict(zip(("neighbours", "boruvka", "labels"), np.diff(clock).tolist(), strict=True))
    found = {"searched": tree.searched / len(points), "result": (tree.weights, labels)}
    return {"seconds": clock[-1] - clock[0], **stages, **found}


def _by_hdbscan(points: np.ndarray, settings: Settings) -> Row:
    from hdbscan import HDBSCAN

    start = time.perf_counter()
    model = HDBSCAN(
        min_samples=settings.min_samples,
        min_cluster_size=settings.size(len(points)),
        gen_min_span_tree=True,
    ).fit(points.astype(np.float64))
    seconds = time.perf_counter() - start
    weights = np.sort(model.minimum_spanning_tree_.to_numpy()[:, 2])
    return {"seconds": seconds, "result": (weights, model.labels_)}


def compared(rows: list[Row]) -> list[Row]:
    """Put what clusters were found, and how both systems agree, in the place of ``result``."""
    from sklearn.metrics import adjusted_rand_score

    results = [row.pop("result") for row in rows]
    for row, (_, labels) in zip(rows, results, strict=True):
        row |= {"clusters": int(labels.max()) + 1, "noise": float(np.mean(labels == -1))}
    if len(rows) == 2:
        (weights, labels), (other_weights, other_labels) = results
        rows[0] |= {
            "times_faster": rows[1]["seconds"] / rows[0]["seconds"],
            "weights_differ": float(np.abs(weights / other_weights - 1).max()),
            "noise_differs": int(((labels == -1) != (other_labels == -1)).sum()),
            "ari": float(adjusted_rand_score(labels, other_labels)),
        }
    return rows


def _circumstances() -> Row:
    today = datetime.now(tz=UTC).date().isoformat()
    return {"date": today, "machine": describe_device("cpu"), "versions": versions()}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    source = Source(
        options.model, options.weights, options.images, options.layer, options.seed, options.limit
    )
    try:
        run(
            source,
            Settings(options.min_samples, options.min_cluster_size),
            sizes=options.sizes,
            hdbscan_limit=options.hdbscan_limit,
            out=options.out,
        )
    except MoeeError as error:
        parser.exit(2, f"clustering: {error}\n")
    print(f"written to {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", default="bundled", help="'bundled' or a timm model name")
    add("--weights", help="a local .safetensors or .pth state dict")
    add("--images", default="bundled", help="folder of class folders")
    add("--limit", type=int, help="images to take the tokens from; else all")
    add("--layer", type=int, default=6, help="whose hidden activations are clustered, from 0")
    add("--sizes", type=int, nargs="+", default=SIZES, help="numbers of tokens")
    add("--hdbscan-limit", type=int, default=10_000, help="most tokens that hdbscan clusters")
    add("--min-samples", type=int, default=10)
    add("--min-cluster-size", type=float, default=0.01, help="as a share of the tokens")
    add("--seed", type=int, default=0, help="of the order in which tokens are drawn")
    add("--out", type=Path, default=Path("docs/speed"))
    return parser


if __name__ == "__main__":
    main()
