"""Which strategy computes a layer fastest, found by measuring once, and why."""

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import nn

from moee_analysis.models.capture import is_traced
from moee_analysis.moe.kernels import Strategy

LITTLE = 20_000_000  # MACs below which no strategy is faster than another by much
FEW = 8  # batches that are not measured for: to measure takes as long as some of them
ENOUGH = 0.01  # seconds after which a strategy need not be timed again
GROUPS = (2, 4, 16, 64)  # of experts; tried beside every expert by itself
AGAIN, CLOSE = 2, 1.5  # times that those no slower than this, in shares of the fastest, are timed
MASKED = Strategy("masked")
_AT_ONCE = ContextVar("at_once", default=False)


@dataclass(frozen=True)
class Choice:
    """A strategy, the reason for it, and the ``seconds`` of each one that was measured."""

    strategy: Strategy
    reason: str
    seconds: dict[Strategy, float] = field(default_factory=dict)


def reason_for_masked(tokens: torch.Tensor, module: nn.Module, *, macs: int) -> str:
    """Why ``masked`` is taken without measuring; "" where so many ``macs`` a token are worth it."""
    if is_traced():  # asked first: a trace is bound to the number of tokens by their len()
        return "traced: no other has shapes that do not depend on the routing"
    tensors = tokens, *module.parameters()
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        return "gradients are wanted"
    little = macs * len(tokens) < LITTLE
    return f"{len(tokens)} tokens are too little work to divide" if little else ""


@contextmanager
def measuring_at_once() -> Iterator[None]:
    """While open, the strategies are measured for the first batch there is."""
    token = _AT_ONCE.set(True)
    try:
        yield
    finally:
        _AT_ONCE.reset(token)


def is_early(batches: int) -> bool:
    """Whether there have been too few ``batches`` of about as many tokens to measure for them."""
    return batches <= FEW and not _AT_ONCE.get()


def situation(tokens: torch.Tensor) -> Hashable:
    """What a choice is made for: about so many tokens, their precision, and threads."""
    device = tokens.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return len(tokens).bit_length(), tokens.device, tokens.dtype, precision, torch.get_num_threads()


def choose_fastest(
    compute: Callable[[Strategy], object], tokens: torch.Tensor, *, experts: int
) -> Choice:
    """Time ``compute`` by every strategy for these tokens, and choose the fastest."""
    strategies = candidates(tokens, experts=experts)
    compute(strategies[0])  # whichever comes first waits for memory
    seconds = {each: seconds_of(partial(compute, each), tokens.device) for each in strategies}
    for _ in range(AGAIN):
        limit = CLOSE * min(seconds.values())
        for each in (each for each in strategies if seconds[each] < limit):
            again = seconds_of(partial(compute, each), tokens.device)
            seconds[each] = min(seconds[each], again)
    times = ", ".join(f"{each} {1e3 * s:.3g} ms" for each, s in seconds.items())
    best = min(seconds, key=seconds.get)
    return Choice(best, f"fastest for {len(tokens)} tokens: {times}", seconds)


def candidates(tokens: torch.Tensor, *, experts: int) -> list[Strategy]:
    """Strategies that may be the fastest; ``grouped_mm`` where torch has a kernel of its own."""
    counts = [*(count for count in GROUPS if count < experts), None]
    names = ["sorted"]
    if tokens.device.type == "cuda" and torch.cuda.get_device_capability(tokens.device) >= (8, 0):
        in_autocast = torch.is_autocast_enabled("cuda")
        dtype = torch.get_autocast_dtype("cuda") if in_autocast else tokens.dtype
        if dtype == torch.bfloat16 and tokens.shape[1] % 8 == 0:
            names.append("grouped_mm")
    return [MASKED, *(Strategy(name, count) for name in names for count in counts)]


def seconds_of(compute: Callable[[], object], device: torch.device) -> float:
    """Time of the shortest of a few runs; of one, where that takes long."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda _: None
    times: list[float] = []
    wait(device)
    while sum(times) < ENOUGH:
        start = time.perf_counter()
        compute()
        wait(device)
        times.append(time.perf_counter() - start)
    return min(times)
