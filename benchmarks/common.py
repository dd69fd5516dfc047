"""What the benchmarks share: their commands, the facts behind their numbers, their files."""

import json
import resource
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import PRESETS, preset_named
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.loading import architecture, load_model
from moee_analysis.utils.environment import describe_device, store_folder, versions
from moee_analysis.utils.storage.files import write_json

Row = dict[str, Any]

MODEL = ("--model", "--weights")
INPUTS = (*MODEL, "--calibration", "--images", "--preset")


def parser_of(name: str, doc: str, *options: str, out: str) -> ArgumentParser:
    """Parser of a benchmark's command, with the folder that it writes to and shared ``options``."""
    folder = {"default": "bundled", "help": "folder of class folders"}
    shared: dict[str, dict[str, Any]] = {
        "--model": {"default": "bundled", "help": "'bundled' or a timm model name"},
        "--weights": {"help": "a local .safetensors or .pth state dict"},
        "--calibration": folder,
        "--images": folder | {"help": "folder of class folders, others than these"},
        "--preset": {"default": "small", "choices": PRESETS},
        "--store": {"type": Path, "default": store_folder() if "--store" in options else None,
                    "help": "of recordings and runs; else your own"},
        "--limit": {"type": int, "help": "images to measure on; else as many as the preset says"},
        "--seeds": {"type": int, "nargs": "+", "default": [0]},
        "--seed": {"type": int, "default": 0},
    }  # fmt: skip
    parser = ArgumentParser(prog=name, description=doc.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(out))
    for option in options:
        parser.add_argument(option, **shared[option])
    return parser


@contextmanager
def command(parser: ArgumentParser, argv: Sequence[str] | None) -> Iterator[Namespace]:
    """Yield the options of a call; an error ends it in one line, else say where the files are."""
    options = parser.parse_args(argv)
    try:
        yield options
    except MoeeError as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    print(f"written to {options.out}")


def inputs(options: Namespace, *, limit: int | None = None) -> tuple[nn.Module, ImageSet, ImageSet]:
    """Return the model, the images to calibrate with and those to measure on, as asked for."""
    sizes = preset_named(options.preset)
    return (
        load_model(options.model, weights=options.weights),
        load_images(options.calibration, split="calibration", limit=sizes.calibration_images),
        load_images(options.images, limit=limit or sizes.evaluation_images),
    )


def in_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a new process: its peak of memory is then its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def peak_bytes() -> float:
    """The most bytes that this process has had in memory."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# What decides the numbers, and what surrounds them


def facts_of(model: nn.Module, **sets: ImageSet) -> Row:
    """Model and images that decide the numbers."""
    named = {k: {"name": s.name, "count": len(s), "sha256": s.fingerprint} for k, s in sets.items()}
    return {"model": {"name": architecture(model), "sha256": fingerprint(model)}, **named}


def circumstances(device: str = "cpu") -> Row:
    """Date, machine and versions."""
    return {
        "date": datetime.now(tz=UTC).date().isoformat(), "machine": describe_device(device),
        "threads": torch.get_num_threads(), "versions": versions(),
    }  # fmt: skip


def place_and_time(facts: Row) -> str:
    """How every caption ends."""
    return f"{facts['date']}, {facts['machine']}, torch {facts['versions']['torch']}."


def read_results(file: Path, facts: Row) -> Row | None:
    """Read the results of an earlier call, which must be of the same ``facts``; None: none yet."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text())
    other = [name for name, value in facts.items() if content["facts"].get(name) != value]
    if other:
        raise MoeeError(
            f"results of the same {', '.join(other)} in '{file}'", "those of another",
            "choose another --out",
        )  # fmt: skip
    return content


# Files


def write_files(out: Path, name: str, content: Row, text: str, figure: Figure | None) -> None:
    """Write the JSON, the Markdown and the figure that are called ``name`` into ``out``."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", content)
    (out / f"{name}.md").write_text(text)
    if figure is not None:
        figure.savefig(out / f"{name}.png")


def as_markdown(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table of texts."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *lines))


def plural(word: str, values: Sequence[object]) -> str:
    """``seed 0`` or ``seeds 0, 1``."""
    return f"{word}{'s' * (len(values) > 1)} {', '.join(map(str, values))}"


def percent_changes(row: Row) -> list[str]:
    """``−28.0``: what the shares of MACs and of parameters that are saved change, in percent."""
    saved = (row["macs_reduction"], row["params_reduction"])
    return [f"{-100 * share:+.1f}".replace("-", "−") for share in saved]


def interval(row: Row, value: str, low: str, high: str) -> str:
    """``90.1 (88.0 to 92.3)``: a share and its interval in percent; a dash where it is missing."""
    if pd.isna(row[value]):
        return "–"
    return f"{100 * row[value]:.1f} ({100 * row[low]:.1f} to {100 * row[high]:.1f})"
