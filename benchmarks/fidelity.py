"""How close training-free systems stay to their dense model at the same savings.

``python benchmarks/fidelity.py`` compares static pruning, MoEE as published, this project's best
recipe and its controls at every operating point, with attention dense and with attention in the
budget too, on images that were not used for calibration. It writes ``fidelity.json``, ``.csv``,
``.md`` and ``.png`` after each point, and computes nothing again that is in ``fidelity.json``.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fidelity_tables import COLUMNS, budget_name, change, write

from moee_analysis import measure
from moee_analysis.baselines.controls import randomly_routed, with_one_expert, with_random_centres
from moee_analysis.baselines.static_pruning import BASELINES, config_of, prune
from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.presets import PRESETS, preset_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.loading import architecture, fingerprint, load_model
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.expert_layer import counting_usage, macs_as_used
from moee_analysis.utils.paths import store_folder
from moee_analysis.utils.storage.store import content_key
from moee_analysis.utils.versions import describe_device, versions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    import torch
    from torch import nn

    from moee_analysis.data.images import ImageSet
    from moee_analysis.extraction.pipeline import Extraction

    Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """Shares of the dense model's MACs and stored parameters to save; None: parameters free."""

    macs: float
    params: float | None = None

    @classmethod
    def parsed(cls, text: str) -> Point:
        """``0.28`` is a budget of MACs, ``0.29/0.20`` one of MACs and parameters."""
        macs, _, params = text.partition("/")
        return cls(float(macs), float(params) if params else None)


FREE, BOUND = (0.20, 0.28, 0.36, 0.45), ((0.29, 0.18), (0.29, 0.20), (0.36, 0.28), (0.36, 0.32))
POINTS = (*map(Point, FREE), *starmap(Point, BOUND))


@dataclass(frozen=True)
class System:
    """A system: its family, its configuration, and whether its tokens are routed at random."""

    family: str
    config: Callable[..., ExtractConfig]
    at_random: bool = False


STATIC, MIXTURE, CONTROL = "static pruning", "mixture of experts", "controls of best"
ATTENTION = "attention too"
_paper = partial(ExtractConfig, recipe="paper")
_best = partial(ExtractConfig, recipe="best")
_both = partial(_best, attention="low_rank")

_baselines = {name: System(STATIC, partial(config_of, name)) for name in BASELINES}

SYSTEMS: dict[str, System] = {
    **{name: system for name, system in _baselines.items() if ATTENTION not in name},
    "paper": System(MIXTURE, _paper),
    "paper, unread constant": System(MIXTURE, partial(_paper, unread="constant")),
    "best": System(MIXTURE, _best),
    "best, random centres": System(CONTROL, lambda **s: with_random_centres(_best(**s))),
    "best, one expert": System(CONTROL, lambda **s: with_one_expert(_best(**s))),
    "best, random routing": System(CONTROL, _best, at_random=True),
    **{
        name: replace(system, family=ATTENTION)
        for name, system in _baselines.items()
        if ATTENTION in name
    },
    "best, attention as read": System(ATTENTION, partial(_best, attention="read")),
    "best, attention too": System(ATTENTION, _both),
    "best, attention too, random centres": System(
        ATTENTION, lambda **s: with_random_centres(_both(**s))
    ),
    "best, attention too, random routing": System(ATTENTION, _both, at_random=True),
}


@dataclass(frozen=True)
class Bench:
    """What all systems are made from and measured on; ``images`` are no calibration images."""

    model: nn.Module
    calibration: ImageSet
    images: ImageSet
    preset: str
    store: Path

    def facts(self) -> dict[str, Any]:
        """What decides the numbers, beside systems, points and seeds."""
        sets = {"images": self.images, "calibration": self.calibration}
        told = {
            k: {"name": s.name, "count": len(s), "sha256": s.fingerprint} for k, s in sets.items()
        }
        model = {"name": architecture(self.model), "sha256": fingerprint(self.model)}
        return {"model": model, "preset": self.preset, **told}

    def config(self, name: str, point: Point, seed: int) -> ExtractConfig:
        """Configuration of a system; a MoeeError if it knows no such budget."""
        return SYSTEMS[name].config(**self._settings(point, seed))

    def key(self, name: str, point: Point, seed: int) -> str:
        """By which a row of the same system, made in the same way, is known again."""
        try:
            made = asdict(self.config(name, point, seed).resolved())
        except MoeeError as error:
            made = str(error)
        return content_key(system=name, point=asdict(point), seed=seed, made=made)

    def extracted(self, name: str, point: Point, seed: int) -> Extraction:
        """Make a system, with what the store already has."""
        if name in BASELINES:
            settings = {**self._settings(point, seed), "store": self.store}
            return prune(self.model, self.calibration, name, **settings)
        config = self.config(name, point, seed)
        return extract(self.model, self.calibration, config, store=self.store)

    def _settings(self, point: Point, seed: int) -> dict[str, Any]:
        budget = {"macs_reduction": point.macs, "params_reduction": point.params}
        return {**budget, "preset": self.preset, "seed": seed}


def run(
    bench: Bench,
    *,
    systems: Sequence[str],
    points: Sequence[Point],
    seeds: Sequence[int],
    out: Path,
) -> pd.DataFrame:
    """Measure what the folder ``out`` does not have yet, write its files, return their table.

    Raises
    ------
    MoeeError
        Images that are calibration images too; an ``out`` of another model or other images.
    """
    check_apart(bench.calibration, bench.images, use="used for calibration")
    facts, rows = found_in(out, bench.facts())
    out.mkdir(parents=True, exist_ok=True)
    tasks = [(point, seed) for point in points for seed in seeds]
    for number, (point, seed) in enumerate(tasks, start=1):
        known = {row["key"] for row in rows}
        missing = [name for name in systems if bench.key(name, point, seed) not in known]
        title = f"[{number}/{len(tasks)}] {budget_name(point.macs, point.params)}, seed {seed}"
        print(f"{title}: {len(missing)} of {len(systems)} systems to measure", flush=True)
        if missing:
            new = measured(bench, missing, point, seed)
            rows = [row for row in rows if not any(_same(row, other) for other in new)] + new
            facts = bench.facts() | _circumstances()
            write(out, facts, rows, order=list(SYSTEMS))
    return write(out, facts, rows, order=list(SYSTEMS))


def found_in(out: Path, facts: dict[str, Any]) -> tuple[dict[str, Any], list[Row]]:
    """Facts and rows that are in ``out`` already; those of ``facts`` must be the same there."""
    file = out / "fidelity.json"
    if not file.is_file():
        return facts | _circumstances(), []
    content = json.loads(file.read_text())
    other = [name for name, value in facts.items() if content["facts"].get(name) != value]
    if other:
        raise MoeeError(
            f"results of the same {', '.join(other)} in '{file}'", "those of another",
            "choose another --out",
        )  # fmt: skip
    return content["facts"], [row for row in content["rows"] if row["system"] in SYSTEMS]


def _circumstances() -> dict[str, Any]:
    today = datetime.now(tz=UTC).date().isoformat()
    return {"date": today, "machine": describe_device("cpu"), "versions": versions()}


def _same(one: Row, other: Row) -> bool:
    """Whether two rows are of the same system, point and seed, however they were made."""
    return all(one[n] == other[n] for n in ("system", "macs_asked", "params_asked", "seed"))


# One point


def measured(bench: Bench, names: Sequence[str], point: Point, seed: int) -> list[Row]:
    """Rows of the systems called ``names``: each is made, then all see every image once."""
    rows, models = {}, {}
    for name in names:
        print(f"  making: {name}", flush=True)
        rows[name], model = _made(bench, name, point, seed)
        if model is not None:
            models[name] = model
    if models:
        print(f"  measuring {len(models)} systems on {len(bench.images)} images", flush=True)
        for name, numbers in _numbers(bench, models).items():
            rows[name] |= numbers
    for row in rows.values():
        print(f"  {_told(row)}", flush=True)
    return list(rows.values())


def _made(bench: Bench, name: str, point: Point, seed: int) -> tuple[Row, nn.Module | None]:
    """One system, and its row as far as it is known without an image; None: it cannot be made."""
    row = dict.fromkeys(COLUMNS) | {"system": name, "family": SYSTEMS[name].family, "seed": seed}
    row |= {"macs_asked": point.macs, "params_asked": point.params}
    row["key"] = bench.key(name, point, seed)
    started = time.perf_counter()
    try:
        extraction = bench.extracted(name, point, seed)
    except MoeeError as error:
        return row | {"reason": str(error)}, None
    row["seconds"] = round(time.perf_counter() - started, 1)
    at_random = SYSTEMS[name].at_random
    return row, randomly_routed(extraction, seed=seed) if at_random else extraction.model


def _numbers(bench: Bench, models: Mapping[str, nn.Module]) -> dict[str, Row]:
    """Accuracy beside the dense model, and what is saved, of all models in one pass."""
    with counting_usage(models) as usage:
        table = measure.accuracy(models, bench.images, reference=bench.model)
    table = table.rename(columns={"reference_top1": "dense_top1"}).set_index("system")
    found = {}
    for name, model in models.items():
        numbers = table.loc[name].to_dict() | savings(model, bench.model, usage[name])
        known = {n: float(numbers[n]) for n in COLUMNS if n in numbers}
        found[name] = {n: v if math.isfinite(v) else None for n, v in known.items()}
    return found


def savings(
    model: nn.Module, dense: nn.Module, usage: Mapping[str, torch.Tensor]
) -> dict[str, float]:
    """Shares of the dense MACs and stored parameters saved, experts used as ``usage`` says."""
    return {
        "macs_reduction": 1 - macs_as_used(model, usage) / count(dense).total,
        "params_reduction": 1 - count_parameters(model) / count_parameters(dense),
    }


def _told(row: Row) -> str:
    if row["reason"]:
        return f"{row['system']}: {row['reason']}"
    retention, kl = (math.nan if row[n] is None else row[n] for n in ("retention", "kl"))
    return (
        f"{row['system']}: retention {retention:.1%}, KL {kl:.3f}, "
        f"MACs {change(row['macs_reduction'])} %, parameters {change(row['params_reduction'])} %, "
        f"{row['seconds']:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        bench = Bench(*inputs(options), options.preset, options.store or store_folder())
        asked = {name: getattr(options, name) for name in ("systems", "points", "seeds", "out")}
        run(bench, **asked)
    except MoeeError as error:
        parser.exit(2, f"fidelity: {error}\n")
    print(f"written to {options.out}")


def inputs(options: argparse.Namespace) -> tuple[nn.Module, ImageSet, ImageSet]:
    """Return the model, the images to calibrate with and those to measure on, as asked for."""
    sizes = preset_named(options.preset)
    return (
        load_model(options.model, weights=options.weights),
        load_images(options.calibration, split="calibration", limit=sizes.calibration_images),
        load_images(options.images, limit=options.limit or sizes.evaluation_images),
    )


def add_inputs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, and which images."""
    add = parser.add_argument
    add("--model", default="bundled", help="'bundled' or a timm model name")
    add("--weights", help="a local .safetensors or .pth state dict")
    add("--calibration", default="bundled", help="folder of class folders")
    add("--images", default="bundled", help="folder of class folders, others than these")
    add("--preset", default="small", choices=PRESETS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_inputs(parser)
    add("--limit", type=int, help="images to measure on; else as many as the preset says")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--points", type=Point.parsed, nargs="+", default=POINTS, help="as in 0.28 0.29/0.20")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    add("--store", type=Path, help="store of recordings, scores and runs; else the user's own")
    add("--out", type=Path, default=Path("reports/fidelity"))
    return parser


if __name__ == "__main__":
    main()
