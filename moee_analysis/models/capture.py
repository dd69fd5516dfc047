"""What modules of a network take in and give out while it runs, and whether it is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

Key = TypeVar("Key")
Side = Literal["inputs", "outputs", "both", "calls"]


@contextmanager
def watch(
    modules: Mapping[Key, nn.Module], see: Callable[[Key, Any], Any], side: Side = "inputs"
) -> Iterator[None]:
    """While open, every call of a module calls ``see(key, value)``.

    ``value`` is the module's first input (``side="inputs"``), its output (``"outputs"``), the
    pair of both (``"both"``), or the arguments, positional and by name (``"calls"``). The value
    that ``see`` returns takes the place of the input or output; None leaves it.
    """
    with ExitStack() as hooks:
        for key, module in modules.items():
            if side in ("inputs", "calls"):
                before = partial(_before, see, key, side)
                hook = module.register_forward_pre_hook(before, with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(_after, see, key, side))
            hooks.callback(hook.remove)
        yield


@contextmanager
def capture(
    model: nn.Module, names: Sequence[str], side: Side = "inputs"
) -> Iterator[dict[str, torch.Tensor]]:
    """While open, yield the latest input or output of the submodules called ``names``, by name."""
    found: dict[str, torch.Tensor] = {}
    with watch({name: model.get_submodule(name) for name in names}, found.__setitem__, side):
        yield found


def is_traced() -> bool:
    """Whether ``torch.compile``, ``torch.export`` or ``torch.jit.trace`` records what is computed.

    A trace has to fit any number of tokens, so nothing may depend on how many there are.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _before(
    see: Callable, key: object, side: Side, _module: nn.Module, args: tuple, named: dict
) -> tuple | None:
    new = see(key, args[0] if side == "inputs" else (args, named))
    return None if new is None or side == "calls" else ((new, *args[1:]), named)


def _after(
    see: Callable, key: object, side: Side, _module: nn.Module, args: tuple, output: Any
) -> Any:  # fmt: skip
    return see(key, (args[0], output) if side == "both" else output)
