"""How much of the speed-up that its MACs promise a mixture of experts reaches.

``python benchmarks/inference.py`` times the dense model, static pruning and this project's best
recipe at one budget of MACs, at several batch sizes and numbers of threads. All of them take turns,
round after round, so that whatever else the machine does slows all of them down. It writes
``inference.json``, ``.md`` and ``.png``. Where cores are shared, threads that spin while they wait
slow each other down many times over: set ``OMP_WAIT_POLICY=PASSIVE``.
"""

from __future__ import annotations

import argparse
import copy
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fidelity import Bench, Point, add_inputs, savings
from inference_tables import ALIKE, DENSE, facts_of, reasons, speed, told, write
from torch import nn
from torch.utils.benchmark import set_torch_threads, timer

from moee_analysis.data.disjoint import check_apart
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.presets import preset_named
from moee_analysis.extraction.pipeline import load
from moee_analysis.measure.evaluation.latency import drawn, in_turn, milliseconds
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import architecture, load_model
from moee_analysis.models.macs import tokens_of
from moee_analysis.moe.blocked_mlp import compute_in_blocks, without_routing
from moee_analysis.moe.expert_layer import counting_usage
from moee_analysis.moe.kernels.autotune import situation, unmeasured
from moee_analysis.moe.layer import all_mlps, moe_layers, set_dispatch
from moee_analysis.utils.paths import store_folder

if TYPE_CHECKING:
    from argparse import Namespace
    from collections.abc import Mapping, Sequence

    from moee_analysis.data.images import ImageSet
    from moee_analysis.extraction.pipeline import Extraction
    from moee_analysis.moe.kernels.autotune import Choice

    Row = dict[str, Any]

EXTRACTED = {"static pruning": "fisher OBS", "best": "best"}  # as they are called in fidelity.py
ATTENTION = {"read": "best, attention as read", "low_rank": "best, attention too"}
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class System:
    """A model, and the speed-up that its MACs promise."""

    model: nn.Module
    promised: float = 1.0


@dataclass(frozen=True)
class Plan:
    """What is timed: every batch with every number of threads, so many rounds of ``seconds``."""

    batches: tuple[int, ...]
    threads: tuple[int, ...]
    seconds: float
    rounds: int
    precision: str = "fp32"


def thread_counts(most: int) -> tuple[int, ...]:
    """Powers of two up to ``most``, and ``most`` itself."""
    return tuple(sorted({*(2**n for n in range(most.bit_length())), most}))


# Systems


def systems_of(
    dense: nn.Module, runs: Mapping[str, Extraction], images: ImageSet
) -> dict[str, System]:
    """Return the dense model, the same with MLPs computed like ours, and the ``runs``, by name."""
    models = {
        name: without_routing(run.model) if run.config.experts == "one" else run.model
        for name, run in runs.items()
    }
    promised = promises(models, dense, images)
    made = {name: System(model.eval(), promised[name]) for name, model in models.items()}
    alike = copy.deepcopy(dense)
    compute_in_blocks(alike)
    return {DENSE: System(dense), ALIKE: System(alike), **made}


def promises(
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


# Times


def run(systems: Mapping[str, System], images: ImageSet, plan: Plan) -> tuple[list[Row], list[Row]]:
    """Time all ``systems``; then, with the largest batch, the layers of those with experts."""
    dense = systems[DENSE].model
    batches = {size: drawn(images, size, dense) for size in plan.batches}
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
                found = measured(systems, drawn_batches, plan)
                rows += [{"batch": size, "threads": threads} | row for row in found]
                title = f"{threads} threads, batch {size}"
                print(title, *map(told, found), sep="\n", flush=True)
            layers += [
                {"batch": len(largest), "threads": threads, "system": name} | row
                for name, system in systems.items()
                for row in layer_times(system.model, dense, largest, seconds=plan.seconds)
            ]
    return rows, layers


def measured(
    systems: Mapping[str, System], batches: Sequence[torch.Tensor], plan: Plan
) -> list[Row]:
    """A row for each of ``systems``, as many threads being used as torch has now."""
    first = {name: first_call(system.model, batches[0]) for name, system in systems.items()}
    models = {name: system.model for name, system in systems.items()}
    rounds = [
        in_turn(models, batches, number, seconds=plan.seconds) for number in range(plan.rounds)
    ]
    times = {name: [each[name] for each in rounds] for name in systems}
    return [
        {"system": name, "first_call": first[name]}
        | speed(times[name], times[DENSE], times[ALIKE], promised=system.promised)
        | {"choices": reasons(choices(system.model, batches[0]))}
        for name, system in systems.items()
    ]


def first_call(model: nn.Module, x: torch.Tensor) -> float:
    """Seconds of a call in which layers find out which way of computing them is the fastest."""
    start = timer()
    model(x)
    return timer() - start


# Layers


def layer_times(
    model: nn.Module, dense: nn.Module, x: torch.Tensor, *, seconds: float
) -> list[Row]:
    """A row for each routed layer: its time, its router's, and that of the MLP it stands for."""
    layers, mlps, rows = moe_layers(model), list(all_mlps(dense).values()), []
    for index, (seen, choice) in choices(model, x).items():
        timed = {"dense": mlps[index], "router": layers[index].router, "layer": layers[index]}
        times = {f"{n}_ms": milliseconds(m, seen, seconds=seconds) for n, m in timed.items()}
        facts = {"layer": index, "tokens": len(tokens_of(seen)), "way": str(choice.way)}
        rows.append(facts | {"experts": layers[index].n_experts} | times)
    return rows


def choices(model: nn.Module, x: torch.Tensor) -> dict[int, tuple[torch.Tensor, Choice]]:
    """What each routed layer gets in a call, and how it has chosen to compute that, by index."""
    made = {}

    def look(index: int, layer: nn.Module, args: tuple[torch.Tensor]) -> None:
        tokens = tokens_of(args[0])
        made[index] = args[0], unmeasured(layer, tokens) or layer.choices[situation(tokens)]

    with ExitStack() as hooks:
        for index, layer in moe_layers(model).items():
            hooks.callback(layer.register_forward_pre_hook(partial(look, index)).remove)
        model(x)
    return made


# The command


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and say where the files are."""
    parser = _parser()
    options = parser.parse_args(argv)
    most = torch.get_num_threads()
    threads = options.threads or (thread_counts(most) if options.device == "cpu" else (most,))
    plan = Plan(
        options.batches, threads, options.seconds, options.rounds, precision=options.precision
    )
    try:
        dense = load_model(options.model, weights=options.weights, device=options.device)
        limit = options.limit or preset_named(options.preset).evaluation_images
        images = load_images(options.images, limit=limit)
        runs = loaded(options.run, dense) if options.run else extracted(options, dense, images)
        rows, layers = run(systems_of(dense, runs, images), images, plan)
        write(options.out, facts_of(dense, runs, images, plan), rows, layers)
    except MoeeError as error:
        parser.exit(2, f"inference: {error}\n")
    print(f"written to {options.out}")


def loaded(folders: Sequence[Path], dense: nn.Module) -> dict[str, Extraction]:
    """Saved runs of the model ``dense``, called as their folders are."""
    runs = {folder.resolve().name: load(folder) for folder in folders}
    if len(runs) < len(folders):
        raise MoeeError("runs in folders of different names", ", ".join(runs), "rename the folders")
    like = next(dense.parameters())
    for name, each in runs.items():
        if each.provenance["weights_sha256"] != hash_weights(dense):
            raise MoeeError(
                f"a run of this {architecture(dense)}", f"'{name}' of other weights",
                "pass the --model and --weights it was extracted from",
            )  # fmt: skip
        each.model.to(like.device)
    return runs


def extracted(options: Namespace, dense: nn.Module, images: ImageSet) -> dict[str, Extraction]:
    """Static pruning and the best recipe at one budget of MACs, with what the store has."""
    limit = preset_named(options.preset).calibration_images
    calibration = load_images(options.calibration, split="calibration", limit=limit)
    bench = Bench(dense, calibration, images, options.preset, options.store or store_folder())
    check_apart(calibration, images, use="used for calibration")
    names = EXTRACTED | {ATTENTION[mode]: ATTENTION[mode] for mode in options.attention}
    runs = {}
    for name, known_as in names.items():
        print(f"making: {name}", flush=True)
        runs[name] = bench.extracted(known_as, Point(options.macs_reduction), options.seed)
    return runs


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add_inputs(parser)
    add("--limit", type=int, help="images whose routes count; else as many as the preset says")
    add("--seed", type=int, default=0)
    add("--macs-reduction", type=float, default=0.28, help="share of the dense MACs to save")
    add("--attention", nargs="*", default=["read"], choices=ATTENTION, help="in the budget too")
    add("--run", type=Path, action="append", help="a saved run to time; then none is extracted")
    add("--batches", type=_numbers, default=(1, 8, 64), help="images at a time, as in 1,8,64")
    add("--threads", type=_numbers, help="as in 1,2; else powers of two up to torch's own number")
    add("--seconds", type=float, default=0.5, help="of one measurement, at least")
    add("--rounds", type=int, default=9, help="measurements of every system")
    add("--precision", default="fp32", choices=PRECISIONS)
    add("--device", default="cpu")
    add("--store", type=Path, help="store of recordings, scores and runs; else the user's own")
    add("--out", type=Path, default=Path("reports/inference"))
    return parser


def _numbers(text: str) -> tuple[int, ...]:
    """``1,8,64`` as numbers; a ValueError, which the parser tells, if one is not positive."""
    numbers = tuple(map(int, text.split(",")))
    if min(numbers) < 1:
        raise ValueError(text)
    return numbers


if __name__ == "__main__":
    main()
