"""A network while it runs: evaluated, watched, started at one of its blocks, or traced."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, TypeVar

import torch
from torch import nn

Key = TypeVar("Key")
Side = Literal["inputs", "outputs", "both", "calls"]


@contextmanager
def switched(things: Iterable[Any], **values: Any) -> Iterator[None]:
    """While open, all ``things`` have attributes of these ``values``; each gets its own back."""
    own = [(thing, name, getattr(thing, name)) for thing in things for name in values]
    try:
        for thing, name, _ in own:
            setattr(thing, name, values[name])
        yield
    finally:
        for thing, name, before in own:
            setattr(thing, name, before)


@contextmanager
def restored(modules: Iterable[nn.Module]) -> Iterator[None]:
    """While open, attributes of ``modules`` may come, change and go; all get their own back."""
    before = [(vars(module), dict(vars(module))) for module in modules]
    try:
        yield
    finally:
        for attributes, own in before:
            attributes.clear()
            attributes.update(own)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with switched(model.modules(), training=False), torch.no_grad():
        yield


@contextmanager
def watch(
    modules: Mapping[Key, nn.Module], see: Callable[[Key, Any], Any], side: Side = "inputs"
) -> Iterator[None]:
    """While open, every call of a module calls ``see(key, value)``.

    ``value`` is the module's first input, its output, the pair of both, or all its arguments. What
    ``see`` returns, unless it is None, takes the place of the input or output.
    """

    def before(key: Key, _module: nn.Module, args: tuple, named: dict) -> tuple | None:
        new = see(key, args[0] if side == "inputs" else (args, named))
        return None if new is None or side == "calls" else ((new, *args[1:]), named)

    def after(key: Key, _module: nn.Module, args: tuple, output: Any) -> Any:
        return see(key, (args[0], output) if side == "both" else output)

    with ExitStack() as hooks:
        for key, module in modules.items():
            if side in ("inputs", "calls"):
                hook = module.register_forward_pre_hook(partial(before, key), with_kwargs=True)
            else:
                hook = module.register_forward_hook(partial(after, key))
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
    """Whether torch records what is computed: for any number of tokens, so nothing asks for it."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


Block = tuple[nn.Sequential, int]  # blocks that run one after the other, and the number of one


def block_of(model: nn.Module, name: str) -> Block | None:
    """Return the outermost block, or stage, in an ``nn.Sequential`` that holds the module ``name``.

    None where there is none, or it is the first one: nothing can be left out.
    """
    parts = name.split(".")
    for depth, number in enumerate(parts[1:], start=1):
        holder = model.get_submodule(".".join(parts[:depth]))
        if isinstance(holder, nn.Sequential):
            return (holder, int(number)) if number.isdigit() and int(number) else None
    return None


@contextmanager
def seeing_inputs(known: Iterable[Block]) -> Iterator[dict[Block, torch.Tensor]]:
    """While open, a run of the model leaves what enters each block, if that is a single tensor."""
    seen: dict[Block, torch.Tensor] = {}

    def see(block: Block, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, named = call
        seen.pop(block, None)
        if len(args) == 1 and not any(value is not None for value in named.values()):
            seen[block] = args[0]

    with watch({(blocks, n): blocks[n] for blocks, n in known}, see, "calls"):
        yield seen


@contextmanager
def starting_at(block: Block | None, entering: torch.Tensor | None) -> Iterator[None]:
    """While open, runs start at ``block`` with the tensor ``entering`` it; None: as they are."""
    if block is None or entering is None:
        yield
        return
    blocks, number = block
    constant = nn.Identity()
    constant.forward = lambda *_, **__: entering
    with switched([blocks], **{str(before): constant for before in range(number)}):
        yield
