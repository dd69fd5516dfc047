"""How close training-free systems stay to their dense model at the same savings.

``python benchmarks/fidelity.py`` compares static pruning, token merging, MoEE as published, this
project's best recipe and its controls at every operating point: of MLPs alone, of attention too, of
tokens that merge, and of all three, on images that were not used for calibration. It writes
``fidelity.json``, ``.csv``, ``.md`` and ``.png`` after each point, and computes nothing again that
is in ``fidelity.json`` or in the store and was made by the same code.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from itertools import starmap
from pathlib import Path
from typing import Any, Self

import common
import pandas as pd
import torch
from common import Row
from fidelity_tables import COLUMNS, budget_name, write
from torch import nn

from moee_analysis import measure
from moee_analysis.baselines import token_merging
from moee_analysis.baselines.controls import (
    randomly_merged,
    randomly_routed,
    with_random_centres,
)
from moee_analysis.baselines.static_pruning import BASELINES, config_of, prune
from moee_analysis.baselines.token_merging import TokenMergingConfig
from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.merging import MergedMacs, candidates, merge_by_search
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.moe.layer import counting_usage, macs_as_used
from moee_analysis.utils.environment import code_version
from moee_analysis.utils.storage.store import content_key


@dataclass(frozen=True)
class Point:
    """Shares of the dense model's MACs and stored parameters to save; None: parameters free."""

    macs: float
    params: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """``0.28`` is a budget of MACs, ``0.29/0.20`` one of MACs and parameters."""
        macs, _, params = text.partition("/")
        return cls(float(macs), float(params) if params else None)


FREE, BOUND = (0.28, 0.36, 0.45, 0.50, 0.60), ((0.29, 0.18), (0.36, 0.28))
CODE = code_version("models", "data", "moe", "extraction", "baselines")  # that decides the numbers
POINTS = (*map(Point, FREE), *starmap(Point, BOUND))


Config = ExtractConfig | TokenMergingConfig | None


@dataclass(frozen=True)
class System:
    """A system: its family, its configuration (None: merging alone), and what chance takes over."""

    family: str
    config: Callable[..., Config]
    control: Callable[..., nn.Module] | None = None


STATIC, MIXTURE, CONTROL = "static pruning", "mixture of experts", "controls of best"
ATTENTION, MERGING, ALL = "attention too", "merging", "all three"
_paper = partial(ExtractConfig, recipe="paper")
_best = partial(ExtractConfig, recipe="best")
_both = partial(_best, attention="low_rank")
_all = partial(_both, merging="budget")
_static = {name: partial(config_of, name) for name in BASELINES}


def _tome(*, macs_reduction: float, seed: int, weights: str = "sizes", **_: Any) -> Config:
    return TokenMergingConfig(weights, macs_reduction, seed)


def _one(make: Callable[..., ExtractConfig]) -> Callable[..., ExtractConfig]:
    return lambda **settings: replace(make(**settings), experts="one")


def _random_centres(make: Callable[..., ExtractConfig]) -> Callable[..., ExtractConfig]:
    return lambda **settings: with_random_centres(make(**settings))


SYSTEMS: dict[str, System] = {
    **{name: System(STATIC, make) for name, make in _static.items() if ATTENTION not in name},
    "paper": System(MIXTURE, _paper),
    "best": System(MIXTURE, _best),
    "best, random centres": System(CONTROL, _random_centres(_best)),
    "best, one expert": System(CONTROL, _one(_best)),
    "best, random routing": System(CONTROL, _best, randomly_routed),
    **{name: System(ATTENTION, make) for name, make in _static.items() if ATTENTION in name},
    "best, attention too": System(ATTENTION, _both),
    "best, attention too, random routing": System(ATTENTION, _both, randomly_routed),
    "ToMe": System(MERGING, _tome),
    "ToMe, class importance": System(MERGING, partial(_tome, weights="importance")),
    "merging alone": System(MERGING, lambda **_: None),
    "best, merging": System(MERGING, partial(_best, merging="budget")),
    "fisher OBS, attention and merging": System(
        ALL, partial(config_of, "fisher OBS, attention too", merging="budget")
    ),
    "best, all three": System(ALL, _all),
    "best, all three, random centres": System(ALL, _random_centres(_all)),
    "best, all three, one expert": System(ALL, _one(_all)),
    "best, all three, random routing": System(ALL, _all, randomly_routed),
    "best, all three, random merging": System(ALL, _all, randomly_merged),
}


@dataclass(frozen=True)
class Bench:
    """What all systems are made from and measured on; ``images`` are no calibration images."""

    model: nn.Module
    calibration: ImageSet
    images: ImageSet
    preset: str
    store: Path

    def facts(self) -> Row:
        """What decides the numbers, beside systems, points and seeds."""
        sets = common.facts_of(self.model, images=self.images, calibration=self.calibration)
        return sets | {"preset": self.preset}

    def config(self, name: str, point: Point, seed: int) -> Config:
        """Configuration of a system; a MoeeError if it knows no such budget."""
        return SYSTEMS[name].config(**self._settings(point, seed))

    def key(self, name: str, point: Point, seed: int) -> str:
        """By which a row of the same system, made in the same way, is known again."""
        try:
            made: Any = self.config(name, point, seed)
        except MoeeError as error:
            made = str(error)
        if isinstance(made, ExtractConfig):
            made = made.resolved()
        if is_dataclass(made):
            made = asdict(made)
        return content_key(system=name, point=asdict(point), seed=seed, made=made, code=CODE)

    def extracted(self, name: str, point: Point, seed: int) -> Extraction | nn.Module:
        """Make a system, with what the store already has of this code."""
        store, sources = self.store / f"code-{CODE[:12]}", (self.model, self.calibration)
        if name in BASELINES:
            return prune(*sources, name, **self._settings(point, seed), store=store)
        config = self.config(name, point, seed)
        if config is None:
            macs = MergedMacs.of(self.model, unread="routed")
            tried = candidates(self.model, macs, point.macs)
            return merge_by_search(*sources, tried, root=store)
        convert = extract if isinstance(config, ExtractConfig) else token_merging.convert
        return convert(*sources, config, store=store)

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

    Images that are calibration images too are refused, and an ``out`` of other images or models.
    """
    check_disjoint(bench.calibration, bench.images, use="used for calibration")
    found = common.read_results(out / "fidelity.json", bench.facts())
    facts = found["facts"] if found else bench.facts() | common.circumstances()
    rows = [row for row in found["rows"] if row["system"] in SYSTEMS] if found else []
    tasks = [(point, seed) for point in points for seed in seeds]
    for number, (point, seed) in enumerate(tasks, start=1):
        known = {row["key"] for row in rows}
        missing = [name for name in systems if bench.key(name, point, seed) not in known]
        title = f"[{number}/{len(tasks)}] {budget_name(point.macs, point.params)}, seed {seed}"
        print(f"{title}: {len(missing)} of {len(systems)} systems to measure", flush=True)
        if missing:
            new = measure_at(bench, missing, point, seed)
            rows = [row for row in rows if not any(_same(row, other) for other in new)] + new
            facts = bench.facts() | common.circumstances()
            write(out, facts, rows, order=list(SYSTEMS))
    return write(out, facts, rows, order=list(SYSTEMS))


def _same(one: Row, other: Row) -> bool:
    """Whether two rows are of the same system, point and seed, however they were made."""
    return all(one[n] == other[n] for n in ("system", "macs_asked", "params_asked", "seed"))


# One point


def measure_at(bench: Bench, names: Sequence[str], point: Point, seed: int) -> list[Row]:
    """Rows of the systems called ``names``: each is made, then all see every image once."""
    rows, models = {}, {}
    for name in names:
        print(f"  making: {name}", flush=True)
        rows[name], model = _make(bench, name, point, seed)
        if model is not None:
            models[name] = model
    if models:
        print(f"  measuring {len(models)} systems on {len(bench.images)} images", flush=True)
        for name, numbers in _measure(bench, models).items():
            rows[name] |= numbers
    for row in rows.values():
        print(f"  {_as_text(row)}", flush=True)
    return list(rows.values())


def _make(bench: Bench, name: str, point: Point, seed: int) -> tuple[Row, nn.Module | None]:
    """One system, and its row as far as it is known without an image; None: it cannot be made."""
    row = dict.fromkeys(COLUMNS) | {"system": name, "family": SYSTEMS[name].family, "seed": seed}
    row |= {"macs_asked": point.macs, "params_asked": point.params}
    row["key"] = bench.key(name, point, seed)
    started = time.perf_counter()
    try:
        made = bench.extracted(name, point, seed)
    except MoeeError as error:
        return row | {"reason": str(error)}, None
    row["seconds"] = round(time.perf_counter() - started, 1)
    if control := SYSTEMS[name].control:
        return row, control(made, seed=seed)
    return row, made if isinstance(made, nn.Module) else made.model


def _measure(bench: Bench, models: Mapping[str, nn.Module]) -> dict[str, Row]:
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


def _as_text(row: Row) -> str:
    if row["reason"]:
        return f"{row['system']}: {row['reason']}"
    retention, kl = (math.nan if row[n] is None else row[n] for n in ("retention", "kl"))
    macs, params = common.percent_changes(row)
    return (
        f"{row['system']}: retention {retention:.1%}, KL {kl:.3f}, "
        f"MACs {macs} %, parameters {params} %, {row['seconds']:.0f} s"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.INPUTS, "--store", "--limit", "--seeds")
    parser = common.parser_of("fidelity", __doc__, *options, out="reports/fidelity")
    add = parser.add_argument
    add("--points", type=Point.parse, nargs="+", default=POINTS, help="as in 0.28 0.29/0.20")
    add("--systems", nargs="+", default=list(SYSTEMS), choices=SYSTEMS)
    with common.command(parser, argv) as asked:
        bench = Bench(*common.inputs(asked, limit=asked.limit), asked.preset, asked.store)
        what = {name: getattr(asked, name) for name in ("systems", "points", "seeds")}
        run(bench, **what, out=asked.out)


if __name__ == "__main__":
    main()
