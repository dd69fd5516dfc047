"""How long HDBSCAN takes: this package's spanning tree against hdbscan's default.

``python benchmarks/clustering.py`` clusters hidden activations of one layer, more and more tokens,
all tokens of all images equally likely, with both systems in turns, each time in a process of its
own. It writes ``clustering.json``, ``.md`` and ``.png`` after every size.
"""

import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
from common import Row
from figures import clustering_time
from sklearn.metrics import adjusted_rand_score

from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.cluster.clustering import label_tree
from moee_analysis.extraction.cluster.spanning_tree import find_neighbours, grow_tree
from moee_analysis.extraction.record.recording import Recording
from moee_analysis.extraction.record.tokens import TokenPlan
from moee_analysis.models.loading import find_mlps, load_model

SIZES = (1000, 2500, 5000, 10_000, 20_000, 40_000, 100_000)
WARM = 300  # points that are clustered before the clock starts
SETTLED = 2500  # tokens from which exponents are fitted: below, little depends on their number
OURS, THEIRS = "products", "hdbscan"
NAMES = {OURS: "products of matrices", THEIRS: "hdbscan, its default"}
STAGES = ("neighbours", "boruvka", "labels")


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
    source: Source, settings: Settings, *, sizes: Sequence[int], hdbscan_limit: int, out: Path
) -> list[Row]:
    """Measure both systems at all ``sizes``, hdbscan up to its limit; write the files of ``out``.

    What cannot be loaded is refused, and a layer that is not there, and too few tokens.
    """
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "points.npy"
        facts = common.in_process(save_points, source, file, max(sizes))
        facts |= {"settings": asdict(settings)} | common.circumstances()
        for size in sorted(sizes):
            systems = (OURS, THEIRS) if size <= hdbscan_limit else (OURS,)
            new = compare([common.in_process(measure, s, file, size, settings) for s in systems])
            rows += new
            print("\n".join(as_text(row) for row in new), flush=True)
            write(out, facts, rows)
    return rows


def save_points(source: Source, file: Path, count: int) -> Row:
    """Save ``count`` tokens of a layer's hidden activations, in random order; say what they are."""
    model = load_model(source.model, weights=source.weights)
    images = load_images(source.images, split="calibration", limit=source.limit)
    sites = [site for site in find_mlps(model) if site.index == source.layer]
    if not sites:
        raise MoeeError("a layer of the model", str(source.layer), "count its layers from 0")
    recording = Recording(model, images, tuple(sites), TokenPlan(None, prefix=0))
    hidden = recording.in_memory()[sites[0].name].hidden
    if len(hidden) < count:
        raise MoeeError(
            f"{count} tokens", f"{len(hidden)} in {len(images)} images",
            "take more --images, or smaller --sizes",
        )  # fmt: skip
    rows = np.random.default_rng(source.seed).permutation(len(hidden))[:count]
    np.save(file, hidden[rows])
    layer = {"layer": sites[0].name, "dim": sites[0].hidden, "tokens": len(hidden)}
    return common.facts_of(model, images=images) | layer | {"seed": source.seed}


def measure(system: str, file: Path, count: int, settings: Settings) -> Row:
    """Time one system on the first ``count`` points of ``file``, once, after it has warmed up."""
    points = np.load(file, mmap_mode="r")[:count].astype(np.float32)
    cluster = {OURS: _by_products, THEIRS: _by_hdbscan}[system]
    cluster(points[:WARM], settings)
    row = {"system": system, "tokens": count} | cluster(points, settings)
    return row | {"peak_gb": common.peak_bytes() / 1e9}


def _by_products(points: np.ndarray, settings: Settings) -> Row:
    clock = [time.perf_counter()]
    forest = find_neighbours(points, settings.min_samples)
    clock.append(time.perf_counter())
    tree = grow_tree(forest)
    clock.append(time.perf_counter())
    labels = label_tree(tree, min_cluster_size=settings.size(len(points)))
    clock.append(time.perf_counter())
    stages = dict(zip(STAGES, np.diff(clock).tolist(), strict=True))
    found = {"searched": tree.searched / len(points), "result": (tree.weights, labels)}
    return {"seconds": clock[-1] - clock[0], **stages, **found}


def _by_hdbscan(points: np.ndarray, settings: Settings) -> Row:
    from hdbscan import HDBSCAN

    start = time.perf_counter()
    model = HDBSCAN(
        min_samples=settings.min_samples, min_cluster_size=settings.size(len(points)),
        gen_min_span_tree=True,
    ).fit(points.astype(np.float64))  # fmt: skip
    seconds = time.perf_counter() - start
    weights = np.sort(model.minimum_spanning_tree_.to_numpy()[:, 2])
    return {"seconds": seconds, "result": (weights, model.labels_)}


def compare(rows: list[Row]) -> list[Row]:
    """Put the clusters, and how both systems agree, in the place of ``result``."""
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


# The files


def write(out: Path, facts: Row, rows: Sequence[Row]) -> None:
    """Write JSON, Markdown and a figure into ``out``."""
    found, caption = exponents(rows), _caption(facts)
    table = pd.DataFrame(rows)[["system", "tokens", "seconds", "peak_gb"]]
    table["exponent"] = table["system"].map(found).astype(float)
    table["system"] = table["system"].map(NAMES)
    content = {"facts": facts, "rows": list(rows), "exponents": found}
    text, figure = f"{_table(rows)}\n\n{caption}\n", clustering_time(table, caption=caption)
    common.write_files(out, "clustering", content, text, figure)


def exponents(rows: Iterable[Row]) -> dict[str, float]:
    """Exponent of the tokens in each system's seconds, by least squares of the logarithms."""
    found = {}
    for name, own in pd.DataFrame(rows).groupby("system", sort=False):
        large = own[own["tokens"] >= min(SETTLED, own["tokens"].nlargest(2).min())]
        if len(large) > 1:
            slope, _ = np.polyfit(np.log(large["tokens"]), np.log(large["seconds"]), 1)
            found[name] = float(slope)
    return found


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    return (
        f"{row['tokens']:>7,} tokens, {NAMES[row['system']]}: {row['seconds']:.2f} s, "
        f"{row['peak_gb']:.2f} GB, {row['clusters']} clusters, {row['noise']:.1%} noise"
    )


def _table(rows: Sequence[Row]) -> str:
    """Both systems side by side, one line for each number of tokens."""
    header = [
        "tokens", "products (s)", "neighbours, Borůvka, labels (%)", "searched again (%)",
        "hdbscan (s)", "times faster", "products (GB)", "hdbscan (GB)", "weights differ by",
        "noise differs (tokens)", "ARI",
    ]  # fmt: skip
    others = {row["tokens"]: row for row in rows if row["system"] == THEIRS}
    lines = [_line(row, others.get(row["tokens"])) for row in rows if row["system"] == OURS]
    fits = [f"{NAMES[name]} n^{value:.2f}" for name, value in exponents(rows).items()]
    table = common.as_markdown(header, lines)
    return f"{table}\n\nSeconds grow as: {', '.join(fits) or 'not fitted'}."


def _line(ours: Row, theirs: Row | None) -> list[str]:
    shares = " / ".join(f"{100 * ours[stage] / ours['seconds']:.0f}" for stage in STAGES)
    searched = f"{100 * ours['searched']:.1f}"
    cells = [f"{ours['tokens']:,}", f"{ours['seconds']:.2f}", shares, searched]
    if theirs is None:
        return [*cells, "–", "–", f"{ours['peak_gb']:.2f}", *["–"] * 4]
    return [
        *cells, f"{theirs['seconds']:.2f}", f"{ours['times_faster']:.1f}",
        f"{ours['peak_gb']:.2f}", f"{theirs['peak_gb']:.2f}", f"{ours['weights_differ']:.1g}",
        str(ours["noise_differs"]), f"{ours['ari']:.5f}",
    ]  # fmt: skip


def _caption(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    images, settings = facts["images"], facts["settings"]
    return (
        f"HDBSCAN of hidden activations of {facts['layer']}, {facts['dim']} dimensions, of "
        f"{facts['model']['name']} on {images['count']} images ({images['name']}): tokens drawn "
        f"from all {facts['tokens']:,} with seed {facts['seed']}; min_samples "
        f"{settings['min_samples']}, min_cluster_size {settings['min_cluster_size']:.1%}. Every "
        "run once, in a process of its own, after a small one; memory is the largest of the whole "
        "process. In more than 60 dimensions hdbscan's default is Prim's algorithm, exact as well: "
        "only ties let clusters differ. "
        f"{facts['date']}, {facts['machine']}, torch {facts['versions']['torch']}, hdbscan "
        f"{facts['versions']['hdbscan']}."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = common.parser_of("clustering", __doc__, *common.MODEL, out="docs/speed")
    add = parser.add_argument
    add("--images", default="bundled", help="folder of class folders")
    add("--limit", type=int, help="images to take the tokens from; else all")
    add("--layer", type=int, default=6, help="whose hidden activations are clustered, from 0")
    add("--sizes", type=int, nargs="+", default=SIZES, help="numbers of tokens")
    add("--hdbscan-limit", type=int, default=10_000, help="most tokens that hdbscan clusters")
    add("--min-samples", type=int, default=10)
    add("--min-cluster-size", type=float, default=0.01, help="as a share of the tokens")
    add("--seed", type=int, default=0, help="of the order in which tokens are drawn")
    with common.command(parser, argv) as asked:
        source = Source(
            asked.model, asked.weights, asked.images, asked.layer, asked.seed, asked.limit
        )
        settings = Settings(asked.min_samples, asked.min_cluster_size)
        limits = {"sizes": asked.sizes, "hdbscan_limit": asked.hdbscan_limit}
        run(source, settings, **limits, out=asked.out)


if __name__ == "__main__":
    main()
