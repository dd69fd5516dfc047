"""How long models take: always in turn with each other, as ratios in one run."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import cycle

import pandas as pd
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.inputs import check_any
from moee_analysis.models.capture import evaluating
from moee_analysis.models.inputs import like
from moee_analysis.moe.autotune import measuring_at_once
from moee_analysis.utils.checks import real_number, whole_number
from moee_analysis.utils.progress import progress

IN_TURN = 4  # batches of different images: how many tokens an expert gets differs


def latency(
    models: Mapping[str, nn.Module],
    images: ImageSet,
    *,
    reference: nn.Module,
    batch_size: int | None = None,
    rounds: int = 5,
    seconds: float = 0.2,
) -> pd.DataFrame:
    """Time of a batch by every model, and how much quicker it is than the reference.

    All take turns, so that whatever else the machine does slows all of them. ``batch_size`` None:
    what suits the model. ``rounds`` measurements of every model last ``seconds`` each at least.

    A row per model: ``system``, ``batch_size``, ``threads``, ``ms`` (time of a batch, in the
    quickest round), ``speed_up`` (that of the reference over its own), ``slowest`` and ``fastest``
    (extremes of the same ratio within single rounds).
    Raises MoeeError: no images, no rounds, no time.
    """
    whole_number("rounds", rounds)
    real_number("seconds", seconds, above=0)
    check_any(images)
    size = min(fitting_batch(reference, batch_size), len(images))
    batches = choose_batches(images, size, reference)
    every = {**models, None: reference}
    with ExitStack() as stack:
        for model in progress(every.values(), label="ways of computing"):
            stack.enter_context(evaluating(model))
            with measuring_at_once():  # which way of computing a layer is the fastest
                model(batches[0])
        turns = progress(range(rounds), label="latency")
        times = [in_turn(every, batches, number, seconds=seconds) for number in turns]
    rows = []
    for name in models:
        # what other jobs do to a machine only adds to its times: the shortest are the surest
        own, whole = (min(each[key] for each in times) for key in (name, None))
        ratios = [each[None] / each[name] for each in times]
        row = {"system": name, "batch_size": size, "threads": torch.get_num_threads(), "ms": own}
        row |= {"speed_up": whole / own, "slowest": min(ratios), "fastest": max(ratios)}
        rows.append(row)
    return pd.DataFrame(rows)


def choose_batches(images: ImageSet, size: int, model: nn.Module) -> list[torch.Tensor]:
    """A few batches as ``model`` takes them, each even over the classes; too few are refused."""
    if len(images) < size:
        raise MoeeError(f"{size} images for a batch", f"{len(images)}", "give more images")
    count = min(IN_TURN, len(images) // size)
    all_images = torch.cat(list(images.limit(count * size).batches(model)))
    return [like(all_images[start::count], model) for start in range(count)]


def in_turn(
    models: dict[str | None, nn.Module], batches: list[torch.Tensor], number: int, *, seconds: float
) -> dict[str | None, float]:
    """Milliseconds of a call of each model, in one round; every other one goes backwards."""
    order = list(models)[:: -1 if number % 2 else 1]
    return {name: milliseconds(models[name], *batches, seconds=seconds) for name in order}


def milliseconds(module: nn.Module, *inputs: torch.Tensor, seconds: float) -> float:
    """Median time of a call with the ``inputs`` in turn, in so many ``seconds`` at least."""
    logger = logging.getLogger("torch.utils.cpp_extension")
    logger.disabled = True  # the import tells of compilers that it misses
    try:
        from torch.utils.benchmark import Timer
    finally:
        logger.disabled = False

    names = {"module": module, "inputs": cycle(inputs)}
    clock = Timer("module(next(inputs))", globals=names, num_threads=torch.get_num_threads())
    return 1e3 * clock.blocked_autorange(min_run_time=seconds).median
