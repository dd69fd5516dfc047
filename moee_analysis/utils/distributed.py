"""One extraction in many processes: whose images are whose, and sums over all of them.

``torchrun --nproc-per-node N -m moee_analysis.cli extract ...`` starts them. All come to the same
sums, in float64 on the CPU, hence to the same experts.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that torchrun has started, if it has, and leave them at the end."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def processes() -> int:
    """Number of processes; 1 where nobody has started others."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Add up the ``tensor`` of every process, in place, to the same bits in all of them."""
    if processes() > 1:
        dist.all_reduce(tensor)
    return tensor


def sum_gradients(parameters: Sequence[torch.Tensor]) -> None:
    """Add up the gradients of every process, in place; none at all counts as zeros."""
    if processes() == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    summed = all_sum(torch.cat([g.detach().flatten().cpu() for g in grads]))
    for parameter, part in zip(parameters, summed.split([g.numel() for g in grads]), strict=True):
        parameter.grad = part.view_as(parameter).to(parameter)


def agreed(flag: bool) -> bool:  # noqa: FBT001
    """Whether ``flag`` holds in every process."""
    return int(all_sum(torch.tensor(int(flag)))) == processes()


def own_share(count: int) -> range:
    """Consecutive numbers below ``count`` for this process to do, as even as possible."""
    first, behind = (count * number // processes() for number in (rank(), rank() + 1))
    return range(first, behind)


def local_device(device: str) -> str:
    """The accelerator of this process, where ``device`` names only its kind ("cuda")."""
    own = os.environ.get("LOCAL_RANK")
    return device if own is None or device == "cpu" or ":" in device else f"{device}:{own}"
