"""Run only the rest of a network: the tensor that enters one of its blocks is kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moee_analysis.models.capture import watch


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
    """While open, every run of the model leaves the tensor that enters each block, by block.

    A block that gets anything else than one tensor is left out.
    """
    seen: dict[Block, torch.Tensor] = {}

    def see(block: Block, call: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        args, named = call
        seen.pop(block, None)
        if len(args) == 1 and not any(value is not None for value in named.values()):
            seen[block] = args[0]

    with watch({block: block.sequence[block.index] for block in blocks}, see, "calls"):
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
    before = list(block.sequence[: block.index])
    try:
        for place in range(block.index):
            block.sequence[place] = _Constant(entering)
        yield
    finally:
        for place, module in enumerate(before):
            block.sequence[place] = module


class _Constant(nn.Module):
    """In the place of a block: gives the same tensor whatever comes in."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: object, **__: object) -> torch.Tensor:
        return self.value
