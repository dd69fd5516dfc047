"""Which way of computing a layer is the fastest, found by measuring once, and why."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from moee_analysis.moe.kernels.dispatch import Way
from moee_analysis.utils.matmul import fastest_kernel, is_traced, onednn_speed, onednn_takes

if TYPE_CHECKING:
    from collections.abc import Hashable

    from moee_analysis.moe.layer import MoeMlp

LITTLE = 20_000_000  # MACs below which no way is faster than another by much
ENOUGH = 0.01  # seconds after which a way need not be timed again
GROUPS = (2, 4, 16, 64)  # of experts; tried beside all in one and every one by itself
AGAIN, CLOSE = 2, 1.5  # times that ways no slower than this, in shares of the fastest, are timed
MASKED = Way("masked")


@dataclass(frozen=True)
class Choice:
    """The way that was chosen, why, and how many ``seconds`` each of those measured took."""

    way: Way
    reason: str
    seconds: dict[Way, float] = field(default_factory=dict)


def unmeasured(layer: MoeMlp, tokens: torch.Tensor) -> Choice | None:
    """Return the choice where nothing is to be measured, None where it is worth it."""
    if is_traced():
        return Choice(MASKED, "traced: the only way whose shapes do not depend on the routing")
    if torch.is_grad_enabled() and (
        tokens.requires_grad or any(p.requires_grad for p in layer.parameters())
    ):
        return Choice(MASKED, "gradients are wanted")
    if len(tokens) * layer.fc1.weight.numel() * 2 < LITTLE:
        return Choice(MASKED, f"{len(tokens)} tokens are too little work to divide")
    return None


def situation(tokens: torch.Tensor) -> Hashable:
    """What a choice holds for: about so many tokens, so computed, with so many threads."""
    device = tokens.device.type
    precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    computed = tokens.device, tokens.dtype, precision, onednn_takes(tokens)
    return len(tokens).bit_length(), *computed, torch.get_num_threads()


def measured(layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor) -> Choice:
    """Time every way on these tokens, and choose the fastest."""
    ways = candidates(layer, tokens)
    ways[0](layer, tokens, chosen)  # whoever comes first waits for memory
    seconds = {way: _seconds(way, layer, tokens, chosen) for way in ways}
    for _ in range(AGAIN):
        close = CLOSE * min(seconds.values())
        for way in (way for way in ways if seconds[way] < close):
            seconds[way] = min(seconds[way], _seconds(way, layer, tokens, chosen))
    best = min(seconds, key=seconds.get)
    times = ", ".join(f"{way} {1e3 * s:.3g} ms" for way, s in seconds.items())
    why = f"fastest for {len(tokens)} tokens: {times}"
    if best.kernel == "onednn":
        speed = onednn_speed(torch.get_num_threads())
        why += f"; oneDNN multiplies {speed:.2g} times as fast as BLAS here"
    return Choice(best, why, seconds)


def candidates(layer: MoeMlp, tokens: torch.Tensor) -> list[Way]:
    """Ways that may be the fastest one for such tokens."""
    counts = [count for count in GROUPS if count < layer.n_experts]
    kernel = fastest_kernel(tokens)
    ways = [Way("masked", None, kernel), *(Way("sorted", n, kernel) for n in (*counts, None))]
    if _has_grouped_mm(tokens):
        ways += [Way("grouped_mm", count) for count in counts] + [Way("grouped_mm")]
    return ways


def _has_grouped_mm(tokens: torch.Tensor) -> bool:
    """Whether torch has a kernel of its own for grouped products of such tokens."""
    if tokens.device.type != "cuda" or torch.cuda.get_device_capability(tokens.device) < (8, 0):
        return False
    in_autocast = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if in_autocast else tokens.dtype
    return dtype == torch.bfloat16 and tokens.shape[1] % 8 == 0


def _seconds(way: Way, layer: MoeMlp, tokens: torch.Tensor, chosen: torch.Tensor) -> float:
    """Shortest time of a few runs; of one, where that takes long."""
    _finish(tokens.device)
    times: list[float] = []
    while sum(times) < ENOUGH:
        start = time.perf_counter()
        way(layer, tokens, chosen)
        _finish(tokens.device)
        times.append(time.perf_counter() - start)
    return min(times)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
