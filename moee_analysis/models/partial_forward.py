"""Run only the rest of a network: what enters one of its blocks is kept, not computed again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class Block:
    """The block number ``index`` of the blocks in ``sequence``, which run one after the other."""

    sequence: nn.Sequential
    index: int


def block_of(model: nn.Module, name: str) -> Block | None:
    """Return the outermost block that holds the module called ``name``.

    timm's transformers keep their blocks, or their stages, in an ``nn.Sequential``. None where
    there is no such sequence, or the module is in its first block: nothing can be left out.
    """
    parts = name.split(".")
    for depth, number in enumerate(parts[1:], start=1):
        holder = model.get_submodule(".".join(parts[:depth]))
        if isinstance(holder, nn.Sequential):
            return Block(holder, int(number)) if number.isdigit() and int(number) else None
    return None


@contextmanager
def seeing_inputs(blocks: Iterable[Block]) -> Iterator[dict[Block, torch.Tensor]]:
    """While open, every run of the model leaves what enters the ``blocks`` in the yielded dict.

    A block that gets anything else than one tensor is left out.
    """
    seen: dict[Block, torch.Tensor] = {}
    with ExitStack() as hooks:
        for block in set(blocks):

            def see(_: nn.Module, args: tuple, given: dict, block: Block = block) -> None:
                seen.pop(block, None)
                if len(args) == 1 and not any(value is not None for value in given.values()):
                    seen[block] = args[0]

            module = block.sequence[block.index]
            hooks.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield seen


@contextmanager
def starting_at(block: Block | None, entering: torch.Tensor | None) -> Iterator[None]:
    """While open, runs of the model start at ``block`` with the tensor ``entering`` it.

    The blocks before it are taken out of their sequence and put back on leaving, also after an
    error. None runs everything.
    """
    if block is None or entering is None:
        yield
        return
    before = [block.sequence[place] for place in range(block.index)]
    try:
        for place in range(block.index):
            block.sequence[place] = _Kept(entering)
        yield
    finally:
        for place, module in enumerate(before):
            block.sequence[place] = module


class _Kept(nn.Module):
    """In the place of a block: gives what was kept."""

    def __init__(self, kept: torch.Tensor) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        return self.kept
