"""How much of the speed-up that its MACs promise a mixture of experts reaches.

``python benchmarks/inference.py`` times the dense model, static pruning and this project's best
recipe at one budget of MACs, at several batch sizes and numbers of threads. All of them take turns,
round after round, so that whatever else the machine does slows all of them down. It writes
``inference.json``, ``.md`` and ``.png``. Where cores are shared, threads that spin while they wait
slow each other down many times over: set ``OMP_WAIT_POLICY=PASSIVE``.
"""

import copy
import os
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from common import Row
from fidelity import Bench, Point, savings
from figures import inference
from torch import nn
from torch.utils.benchmark import set_torch_threads, timer

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.extraction.run import Extraction, load
from moee_analysis.measure.evaluation.latency import choose_batches, in_turn, milliseconds
from moee_analysis.models.capture import watch
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import architecture, load_model
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.autotune import Choice, measuring_at_once
from moee_analysis.moe.layer import (
    all_mlps,
    counting_usage,
    moe_layers,
    set_dispatch,
    without_routing,
)

EXTRACTED = {"static pruning": "fisher OBS", "best": "best"}  # as they are called in fidelity.py
ATTENTION = {"read": "best, attention as read", "low_rank": "best, attention too"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
DENSE = "dense"
COLUMNS = (
    "system", "batch", "threads", "ms", "dense_ms", "speedup", "speedup_low", "speedup_high",
    "promised", "reached", "first_call", "ways",
)  # fmt: skip
"""Of the table. ``ms`` and ``dense_ms`` are of one call with the whole batch, ``first_call`` is in
seconds; ``speedup`` and its quartiles are of the ratios dense / system within a round; ``reached``
is the share of the ``promised`` gain over the dense model, nan where none is promised."""


@dataclass(frozen=True)
class Plan:
    """What is timed: every batch with every number of threads, so many rounds of ``seconds``."""

    batches: tuple[int, ...]
    threads: tuple[int, ...]
    seconds: float
    rounds: int
    precision: str = "fp32"


@dataclass(frozen=True)
class System:
    """A model, and the speed-up that its MACs promise."""

    model: nn.Module
    promised: float = 1.0


def thread_counts(most: int) -> tuple[int, ...]:
    """Powers of two up to ``most``, and ``most`` itself."""
    return tuple(sorted({*(2**n for n in range(most.bit_length())), most}))


def systems_of(
    dense: nn.Module, runs: Mapping[str, Extraction], images: ImageSet
) -> dict[str, System]:
    """Return the dense model and the ``runs``, by name; ``images`` decide what MACs promise."""
    models = {
        name: without_routing(run.model) if run.config.experts == "one" else run.model
        for name, run in runs.items()
    }
    promised = _promises(models, dense, images)
    made = {name: System(model.eval(), promised[name]) for name, model in models.items()}
    return {DENSE: System(dense), **made}


def _promises(
    models: Mapping[str, nn.Module], dense: nn.Module, images: ImageSet
) -> dict[str, float]:
    """MACs of the dense model over those of each other one, with the routes of ``images``."""
    models = {name: copy.deepcopy(model) for name, model in models.items()}
    for model in models.values():
        set_dispatch(model, "masked")  # which needs no choice: the first ones are timed later
    like = next(dense.parameters())
    with counting_usage(models) as usage, torch.inference_mode():
        for x in images.batches(dense):
            for model in models.values():
                model(x.to(like))
    saved = {name: savings(model, dense, usage[name]) for name, model in models.items()}
    return {name: 1 / (1 - shares["macs_reduction"]) for name, shares in saved.items()}


def run(systems: Mapping[str, System], images: ImageSet, plan: Plan) -> tuple[list[Row], list[Row]]:
    """Time all ``systems``; then, with the largest batch, the layers of those with experts."""
    dense = systems[DENSE].model
    batches = {size: choose_batches(images, size, dense) for size in plan.batches}
    largest = batches[max(batches)][0]
    device, precision = largest.device.type, PRECISIONS[plan.precision]
    rows, layers = [], []
    for threads in plan.threads:
        with (
            torch.inference_mode(),
            torch.autocast(device, precision, enabled=precision is not None),
            set_torch_threads(threads),
        ):
            for size, drawn_batches in batches.items():
                found = measure(systems, drawn_batches, plan)
                rows += [{"batch": size, "threads": threads} | row for row in found]
                title = f"{threads} threads, batch {size}"
                print(title, *map(as_text, found), sep="\n", flush=True)
            layers += [
                {"batch": len(largest), "threads": threads, "system": name} | row
                for name, system in systems.items()
                for row in time_layers(system.model, dense, largest, seconds=plan.seconds)
            ]
    return rows, layers


def measure(
    systems: Mapping[str, System], batches: Sequence[torch.Tensor], plan: Plan
) -> list[Row]:
    """A row for each of ``systems``, as many threads being used as torch has now."""
    models, first = {name: system.model for name, system in systems.items()}, {}
    for name, model in models.items():  # in which layers find out which strategy is the fastest
        start = timer()
        with measuring_at_once():
            model(batches[0])
        first[name] = timer() - start
    rounds = [in_turn(models, batches, n, seconds=plan.seconds) for n in range(plan.rounds)]
    times = {name: [each[name] for each in rounds] for name in systems}
    return [
        {"system": name, "first_call": first[name]}
        | speed(times[name], times[DENSE], promised=system.promised)
        | {"choices": _reasons(choices(system.model, batches[0]))}
        for name, system in systems.items()
    ]


def speed(times: Sequence[float], dense: Sequence[float], *, promised: float) -> Row:
    """Numbers of a system from its milliseconds, and those of the dense model, in each round."""
    low, median, high = np.quantile(np.divide(dense, times), [0.25, 0.5, 0.75]).tolist()
    return {
        "ms": float(np.median(times)), "dense_ms": float(np.median(dense)),
        "speedup": median, "speedup_low": low, "speedup_high": high, "promised": promised,
        "reached": (median - 1) / (promised - 1) if promised > 1 else None,
        "rounds_ms": list(times),
    }  # fmt: skip


def _reasons(choices: Mapping[int, tuple[torch.Tensor, Choice]]) -> list[Row]:
    """How each layer is computed, why, and the seconds of each strategy that was tried."""
    return [
        {
            "layer": index, "way": str(choice.strategy), "reason": choice.reason,
            "seconds": {str(each): seconds for each, seconds in choice.seconds.items()},
        }
        for index, (_, choice) in choices.items()
    ]  # fmt: skip


def as_text(row: Row) -> str:
    """One row in a line, while others are still measured."""
    gain = f"speed-up {row['speedup']:.2f} of {row['promised']:.2f}"
    return f"  {row['system']}: {row['ms']:.1f} ms, {gain}"


def time_layers(
    model: nn.Module, dense: nn.Module, x: torch.Tensor, *, seconds: float
) -> list[Row]:
    """A row for each routed layer: its time, its router's, and that of the MLP it stands for."""
    layers, mlps, rows = moe_layers(model), list(all_mlps(dense).values()), []
    for index, (seen, choice) in choices(model, x).items():
        timed = {"dense": mlps[index], "router": layers[index].router, "layer": layers[index]}
        times = {f"{n}_ms": milliseconds(m, seen, seconds=seconds) for n, m in timed.items()}
        facts = {"layer": index, "tokens": len(tokens_of(seen)), "way": str(choice.strategy)}
        rows.append(facts | {"experts": layers[index].n_experts} | times)
    return rows


def choices(model: nn.Module, x: torch.Tensor) -> dict[int, tuple[torch.Tensor, Choice]]:
    """What each routed layer gets in a call, and how it has chosen to compute that, by index."""
    layers, made = moe_layers(model), {}

    def look(index: int, seen: torch.Tensor) -> None:
        layer = layers[index]
        made[index] = seen, layer.choose_strategy(tokens_of(seen), layer.router(seen))

    with watch(layers, look):
        model(x)
    return made


def describe(dense: nn.Module, runs: Mapping[str, Extraction], images: ImageSet, plan: Plan) -> Row:
    """What decides the numbers, and where they were made."""
    return {
        **common.facts_of(dense, images=images), "plan": asdict(plan),
        "systems": {name: asdict(each.config) for name, each in runs.items()},
        **common.circumstances(str(next(dense.parameters()).device)),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip


def write(out: Path, facts: Row, rows: Sequence[Row], layers: Sequence[Row]) -> None:
    """Write all three files into ``out``."""
    table, caption = table_of(rows), _caption(facts)
    content = {"facts": facts, "rows": list(rows), "layers": list(layers)}
    text, figure = f"{_text(table)}\n\n{caption}\n", inference(table, caption=caption)
    common.write_files(out, "inference", content, text, figure)


def table_of(rows: Iterable[Row]) -> pd.DataFrame:
    """Rows as a table of :data:`COLUMNS`, in their order."""
    found = [row | {"ways": count_ways(row["choices"])} for row in rows]
    return pd.DataFrame(found, columns=list(COLUMNS)).astype({"reached": "float64"})


def count_ways(choices: Iterable[Row]) -> str:
    """``3 masked; 8 sorted, 16 groups``: how many layers are computed in which way."""
    counted = Counter(choice["way"] for choice in choices)
    return "; ".join(f"{count} {way}" for way, count in counted.most_common())


def _text(table: pd.DataFrame) -> str:
    """One line for each row, in units that are read easily."""
    header = [
        "threads", "batch", "system", "ms", "dense, ms", "speed-up (quartiles)", "promised",
        "gain reached (%)", "first call (s)", "routed layers",
    ]  # fmt: skip
    lines = [
        [
            str(row.threads), str(row.batch), row.system, f"{row.ms:.1f}", f"{row.dense_ms:.1f}",
            f"{row.speedup:.2f} ({row.speedup_low:.2f} to {row.speedup_high:.2f})",
            f"{row.promised:.2f}",
            "–" if pd.isna(row.reached) else f"{100 * row.reached:.0f}".replace("-", "−"),
            f"{row.first_call:.2f}", row.ways or "–",
        ]
        for row in table.itertuples()
    ]  # fmt: skip
    return common.as_markdown(header, lines)


def _caption(facts: Row) -> str:
    """What the numbers are of, in a few sentences."""
    plan, images = facts["plan"], facts["images"]
    seeds = sorted({config["seed"] for config in facts["systems"].values()})
    return (
        f"{facts['model']['name']}, nothing trained, {common.plural('seed', seeds)}: "
        "how many times as fast as the dense model in the same round; medians and quartiles of "
        f"n = {plan['rounds']} rounds, in which all take turns, "
        f"each for {plan['seconds']:g} s or more, with batches of different images. Promised: the "
        f"dense model's MACs over those with the routes of {images['count']} images "
        f"({images['name']}), routers included. "
        f"{plan['precision']}; threads: {', '.join(map(str, plan['threads']))}; "
        f"{common.place_and_time(facts)}"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.INPUTS, "--store", "--seed")
    parser = common.parser_of("inference", __doc__, *options, out="reports/inference")
    add = parser.add_argument
    add("--limit", type=int, help="images whose routes count; else as many as the preset says")
    add("--macs-reduction", type=float, default=0.28, help="share of the dense MACs to save")
    add("--attention", nargs="*", default=["read"], choices=ATTENTION, help="in the budget too")
    add("--run", type=Path, action="append", help="a saved run to time; then none is extracted")
    add("--batches", type=_numbers, default=(1, 8, 64), help="images at a time, as in 1,8,64")
    add("--threads", type=_numbers, help="as in 1,2; else powers of two up to torch's own number")
    add("--seconds", type=float, default=0.5, help="of one measurement, at least")
    add("--rounds", type=int, default=9, help="measurements of every system")
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--device", default="cpu")
    with common.command(parser, argv) as asked:
        most = torch.get_num_threads()
        threads = asked.threads or (thread_counts(most) if asked.device == "cpu" else (most,))
        plan = Plan(asked.batches, threads, asked.seconds, asked.rounds, precision=asked.precision)
        dense = load_model(asked.model, weights=asked.weights, device=asked.device)
        limit = asked.limit or preset_named(asked.preset).evaluation_images
        images = load_images(asked.images, limit=limit)
        runs = load_runs(asked.run, dense) if asked.run else extract_runs(asked, dense, images)
        rows, layers = run(systems_of(dense, runs, images), images, plan)
        write(asked.out, describe(dense, runs, images, plan), rows, layers)


def load_runs(folders: Sequence[Path], dense: nn.Module) -> dict[str, Extraction]:
    """Saved runs of the model ``dense``, called as their folders are."""
    runs = {folder.resolve().name: load(folder) for folder in folders}
    if len(runs) < len(folders):
        raise MoeeError("runs in folders of different names", ", ".join(runs), "rename the folders")
    for name, each in runs.items():
        if each.provenance["weights_sha256"] != hash_weights(dense):
            raise MoeeError(
                f"a run of this {architecture(dense)}", f"'{name}' of other weights",
                "pass the --model and --weights it was extracted from",
            )  # fmt: skip
        each.model.to(next(dense.parameters()).device)
    return runs


def extract_runs(asked: Namespace, dense: nn.Module, images: ImageSet) -> dict[str, Extraction]:
    """Static pruning and the best recipe at one budget of MACs, with what the store has."""
    limit = preset_named(asked.preset).calibration_images
    calibration = load_images(asked.calibration, split="calibration", limit=limit)
    check_disjoint(calibration, images, use="used for calibration")
    bench = Bench(dense, calibration, images, asked.preset, asked.store)
    names = EXTRACTED | {ATTENTION[mode]: ATTENTION[mode] for mode in asked.attention}
    runs = {}
    for name, system in names.items():
        print(f"making: {name}", flush=True)
        runs[name] = bench.extracted(system, Point(asked.macs_reduction), asked.seed)
    return runs


def _numbers(text: str) -> tuple[int, ...]:
    """``1,8,64`` as numbers; a ValueError, which the parser tells, if one is not positive."""
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


if __name__ == "__main__":
    main()
