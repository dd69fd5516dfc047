"""How much faster smaller models really are, and how close to the dense one, in several engines.

``python benchmarks/inference.py`` times the dense model, static pruning, token merging and this
project's best recipe with and without attention and merging, at several batch sizes and numbers of
threads, in torch and in what else is installed (``engines.py``). All of them take turns, round
after round, so that whatever else the machine does slows all of them down. It writes
``inference.json``, ``.md``, ``.png`` and ``inference_kl.png``. Where cores are shared, threads that
spin while they wait slow each other down many times over: set ``OMP_WAIT_POLICY=PASSIVE``.
"""

import copy
import os
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common
import numpy as np
import pandas as pd
import torch
from common import Row
from engines import ENGINES, INT8, TORCH, usable, write_file
from fidelity import savings
from inference_tables import write
from timed_systems import IN_TIME, SYSTEMS, Run, extract_runs, load_runs
from torch import nn
from torch.utils.benchmark import set_torch_threads, timer

from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.extraction.config import preset_named
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import agreement
from moee_analysis.measure.evaluation.latency import choose_batches, in_turn, milliseconds
from moee_analysis.measure.routing.inputs import model_of
from moee_analysis.models.capture import watch
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import load_model
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.autotune import Choice, measuring_at_once
from moee_analysis.moe.layer import (
    all_mlps,
    counting_usage,
    moe_layers,
    set_dispatch,
    without_routing,
)

CHECKED = 16  # images that the files of engines are checked on
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}
DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What is timed: every batch with every number of threads, so many rounds of ``seconds``."""

    batches: tuple[int, ...]
    threads: tuple[int, ...]
    seconds: float
    rounds: int
    precision: str = "fp32"
    engines: tuple[str, ...] = (TORCH,)


@dataclass(frozen=True)
class System:
    """A model, the speed-up that its MACs promise, and its file for engines other than torch."""

    model: nn.Module
    promised: float = 1.0
    file: Path = Path()


def thread_counts(most: int) -> tuple[int, ...]:
    """Powers of two up to ``most``, and ``most`` itself."""
    return tuple(sorted({*(2**n for n in range(most.bit_length())), most}))


def systems_of(dense: nn.Module, runs: Mapping[str, Run], images: ImageSet) -> dict[str, System]:
    """Return the dense model and the ``runs``, by name; ``images`` decide what MACs promise."""
    models = {name: without_routing(model_of(run)) for name, run in runs.items()}
    promised = _promises(models, dense, images)
    made = {name: System(model.eval(), promised[name]) for name, model in models.items()}
    return {DENSE: System(dense), **made}


def with_files(
    systems: Mapping[str, System], images: ImageSet, engines: Sequence[str], folder: Path
) -> dict[str, System]:
    """Write a file into ``folder`` for every system, where an engine needs it."""
    x = next(images.limit(CHECKED).batches(systems[DENSE].model, batch_size=CHECKED))
    files = {name: folder / f"{number}.onnx" for number, name in enumerate(systems)}
    for name, file in files.items():
        write_file(systems[name].model, like(x, systems[name].model), file, engines)
    return {name: replace(system, file=files[name]) for name, system in systems.items()}


def closeness(
    systems: Mapping[str, System], images: ImageSet, engines: Sequence[str]
) -> dict[tuple[str, str], Row]:
    """``kl`` and ``agreement`` of every system in every engine; most compute what torch does."""
    own = [TORCH, *({INT8} & {*engines})]
    models = {(n, e): ENGINES[e].open(s.model, s.file) for n, s in systems.items() for e in own}
    table = agreement(models, images, reference=systems[DENSE].model)
    table = table.set_index(pd.Index(models, tupleize_cols=False))[["kl", "agreement"]]
    rows = {key: {n: None if pd.isna(v) else float(v) for n, v in row.items()}
            for key, row in table.iterrows()}  # fmt: skip
    return {(n, e): rows[n, e if e in own else TORCH] for n in systems for e in engines}


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
    device = largest.device.type
    rows, layers = [], []
    with computing(plan, max(plan.threads), device):
        near = closeness(systems, images, plan.engines)
    for threads in plan.threads:
        with computing(plan, threads, device):
            for size, drawn_batches in batches.items():
                found = [
                    row | near[row["system"], row["engine"]]
                    for row in measure(systems, drawn_batches, plan)
                ]
                rows += [{"batch": size, "threads": threads} | row for row in found]
                title = f"{threads} threads, batch {size}"
                print(title, *map(as_text, found), sep="\n", flush=True)
            layers += [
                {"batch": len(largest), "threads": threads, "system": name} | row
                for name, system in systems.items()
                for row in time_layers(system.model, dense, largest, seconds=plan.seconds)
            ]
    return rows, layers


@contextmanager
def computing(plan: Plan, threads: int, device: str) -> Iterator[None]:
    """While open, models compute as planned, by so many threads."""
    precision = PRECISIONS[plan.precision]
    lower = torch.autocast(device, precision, enabled=precision is not None)
    with torch.inference_mode(), lower, set_torch_threads(threads):
        yield


def measure(
    systems: Mapping[str, System], batches: Sequence[torch.Tensor], plan: Plan
) -> list[Row]:
    """A row for each of ``systems`` in each engine, by as many threads as torch has now."""
    models, first = {}, {}
    for key in ((name, engine) for engine in plan.engines for name in systems):
        system, start = systems[key[0]], timer()
        models[key] = ENGINES[key[1]].open(system.model, system.file)
        with measuring_at_once():  # layers find out which strategy is the fastest
            models[key](batches[0])
        first[key] = timer() - start
    rounds = [in_turn(models, batches, n, seconds=plan.seconds) for n in range(plan.rounds)]
    times = {key: [each[key] for each in rounds] for key in models}
    made = {TORCH: lambda model: _reasons(choices(model, batches[0]))}
    return [
        {"system": name, "engine": engine, "first_call": first[name, engine]}
        | speed(times[name, engine], times[DENSE, engine], promised=systems[name].promised)
        | {"choices": made.get(engine, lambda _: [])(systems[name].model)}
        for name, engine in models
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
    return f"  {row['system']} ({row['engine']}): {row['ms']:.1f} ms, {gain}"


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


def describe(dense: nn.Module, runs: Mapping[str, Run], images: ImageSet, plan: Plan) -> Row:
    """What decides the numbers, and where they were made."""
    return {
        **common.facts_of(dense, images=images), "plan": asdict(plan),
        "systems": {n: asdict(r.config) for n, r in runs.items() if isinstance(r, Extraction)},
        **common.circumstances(str(next(dense.parameters()).device)), "processor": processor(),
        "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
    }  # fmt: skip


def processor() -> str:
    """What the makers of the CPU call it."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    options = (*common.INPUTS, "--store", "--seed")
    parser = common.parser_of("inference", __doc__, *options, out="reports/inference")
    add = parser.add_argument
    add("--limit", type=int, help="images whose routes count; else as many as the preset says")
    add("--macs-reduction", type=float, nargs="+", default=[0.28], help="of the dense MACs")
    usual = [name for name in SYSTEMS if name not in IN_TIME]  # prices take a quiet machine
    add("--systems", nargs="+", default=usual, choices=SYSTEMS)
    add("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
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
        plain = (asked.device, asked.precision) == ("cpu", "fp32")
        engines = usable([TORCH, *(e for e in asked.engines if e != TORCH)], plain=plain)
        plan = Plan(
            asked.batches, threads, asked.seconds, asked.rounds, asked.precision, engines=engines
        )
        dense = load_model(asked.model, weights=asked.weights, device=asked.device)
        limit = asked.limit or preset_named(asked.preset).evaluation_images
        images = load_images(asked.images, limit=limit)
        runs = load_runs(asked.run, dense) if asked.run else extract_runs(asked, dense, images)
        with tempfile.TemporaryDirectory() as folder:
            systems = systems_of(dense, runs, images)
            systems = with_files(systems, images, plan.engines, Path(folder))
            rows, layers = run(systems, images, plan)
        facts = describe(dense, runs, images, plan)
        left = [name for name in asked.engines if name not in plan.engines]
        write(asked.out, facts | {"engines_left_out": left}, rows, layers)


def _numbers(text: str) -> tuple[int, ...]:
    """``1,8,64`` as numbers; a ValueError, which the parser tells, if one is not positive."""
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


if __name__ == "__main__":
    main()
