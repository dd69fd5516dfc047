"""Vision transformers whose tokens merge, so that fewer of them pass from block to block.

Between the attention and the MLP of a block, patches stand in two rows in turn, A and B. Every
token of A is paired with the one of B that it costs least to merge with, and the cheapest pairs
become one token each: their mean, weighted by the patches that each stands for (ToMe, Bolya et al.,
ICLR 2023). Attention counts a token as often as it stands for a patch. Leading tokens never merge.
After the last block every patch gets the token that it went into, so that outputs have the shape
of the dense model's, and a mean over them counts every patch.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.attention import LowRankAttention, attend_with_keys, is_plain
from moee_analysis.models.capture import switched, watch
from moee_analysis.models.merge_costs import Evidence

BLOCKS = "blocks"  # where a vision transformer of timm's has them


@dataclass(frozen=True)
class Tokens:
    """Tokens of some images on their way through the blocks.

    ``x`` (images, tokens, dim); each stands for ``sizes`` (images, tokens) of those there were at
    first, and ``place`` (images, first tokens) is the token that each of these went into. None:
    all stand for themselves.
    """

    x: torch.Tensor
    sizes: torch.Tensor | None = None
    place: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, images: torch.Tensor | slice) -> Self:
        """Those of some images."""
        return type(self)(*(None if v is None else v[images] for v in vars(self).values()))

    @property
    def counted(self) -> torch.Tensor:
        """``sizes``, ones where none have merged."""
        return self.x.new_ones(self.x.shape[:2]) if self.sizes is None else self.sizes

    @property
    def of_patches(self) -> torch.Tensor:
        """The token that each of the first tokens went into, (images, first tokens, dim)."""
        return self.x if self.place is None else spread(self.x, self.place)


def spread(values: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Return the ``values`` (images, tokens, ...) of the tokens at each ``place`` (images, n).

    With the places of :class:`Tokens` those are given to all that went into each.
    """
    at = place.reshape(*place.shape, *(1 for _ in values.shape[2:]))
    return values.gather(1, at.expand(-1, -1, *values.shape[2:]))


class MergingBlock(nn.Module):
    """A block of a vision transformer, in which ``merges`` patches of an image go into others.

    ``costs`` says what it costs to merge two tokens. Modules are called as in the dense ``block``.
    """

    def __init__(
        self, block: "Block | MergingBlock", costs: nn.Module, merges: int, leading: int
    ) -> None:
        super().__init__()
        for name, part in block.named_children():
            self.add_module(name, part)
        self.costs, self.merges, self.leading = costs, merges, leading

    def forward(self, tokens: Tokens) -> Tokens:
        """Attention, merging, MLP; refuses a tensor."""
        if not isinstance(tokens, Tokens):
            expected = "blocks that run one after the other, each on what the last one left"
            hint = "call the model as a whole, without checkpoints or intermediate outputs"
            raise MoeeError(expected, "a block that is called by itself", hint)
        seen, keys = self.norm1(tokens.x), None
        mask = None if tokens.sizes is None else tokens.sizes.log()[:, None, None]
        if self.merges and self.costs.reads_keys:
            attended, keys = attend_with_keys(self.attn, seen, mask)
        else:
            attended = self.attn(seen, attn_mask=mask)
        x = tokens.x + self.drop_path1(self.ls1(attended))
        tokens = Tokens(x, tokens.sizes, tokens.place)
        if self.merges:
            read = x.detach(), tokens.counted, self.leading, self.attn, seen.detach(), keys
            tokens = self.merge(tokens, Evidence(*read))
        x = tokens.x + self.drop_path2(self.ls2(self.mlp(self.norm2(tokens.x))))
        return Tokens(x, tokens.sizes, tokens.place)

    def merge(self, tokens: Tokens, evidence: Evidence) -> Tokens:
        """Merge the cheapest pairs; tokens that stay keep their order."""
        costs, weights = self.costs(evidence)
        cheapest, partner = costs.min(dim=2)
        merges = min(self.merges, cheapest.shape[1])
        gone = cheapest.topk(merges, dim=1, largest=False, sorted=False).indices
        target = partner.gather(1, gone)
        gone, target = self.leading + 2 * gone, self.leading + 2 * target + 1
        return join(tokens, gone, target, weights)


def join(tokens: Tokens, gone: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> Tokens:
    """Join the tokens ``gone`` with ``target``, positions (images, merges) of which none is both.

    Every token is the mean of those it came from, by their ``weights`` (images, tokens).
    """
    number = torch.ones_like(weights, dtype=torch.int64).scatter(1, gone, 0).cumsum(dim=1) - 1
    into = number.gather(1, target)
    number = number.scatter(1, gone, into)
    left = weights.shape[1] - gone.shape[1]

    def add_up(values: torch.Tensor) -> torch.Tensor:
        return values.new_zeros(values.shape[0], left).scatter_add(1, number, values)

    # The mean is what stays, moved by a share of its distance to each token that goes: few rows.
    share = weights.gather(1, gone) / add_up(weights).gather(1, into)
    moved = share[..., None] * (spread(tokens.x, gone) - spread(tokens.x, target))
    x = spread(tokens.x, _positions(number, gone, left))
    x = x.scatter_add_(1, into[..., None].expand_as(moved), moved.to(x.dtype))
    place = number if tokens.place is None else number.gather(1, tokens.place)
    return Tokens(x, add_up(tokens.counted), place)


def _positions(number: torch.Tensor, gone: torch.Tensor, left: int) -> torch.Tensor:
    """Where each of the tokens that are left was, (images, left), by the new ``number`` of all."""
    positions = torch.arange(number.shape[1], device=number.device).expand_as(number)
    own = number.scatter(1, gone, torch.ones_like(gone) * left)  # what has gone comes last
    return number.new_empty(number.shape[0], left + 1).scatter(1, own, positions)[:, :left]


class MergingBlocks(nn.Sequential):
    """The blocks of a vision transformer whose tokens merge, in the place of the dense ones."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (images, tokens, dim) to the same shape."""
        tokens = Tokens(x)
        for block in self:
            tokens = block(tokens)
        return tokens.of_patches

    @property
    def schedule(self) -> tuple[int, ...]:
        """How many tokens of an image merge in each block."""
        return tuple(block.merges for block in self)


def merging_blocks(model: nn.Module) -> MergingBlocks | None:
    """Return the blocks of a model whose tokens merge; None: they do not."""
    blocks = getattr(model, BLOCKS, None)
    return blocks if isinstance(blocks, MergingBlocks) else None


def merge_costs(model: nn.Module) -> dict[str, nn.Module]:
    """Return what says which tokens merge, by module name; of blocks where some do."""
    numbered = enumerate(merging_blocks(model) or ())
    return {f"{BLOCKS}.{n}.costs": block.costs for n, block in numbered if block.merges}


@contextmanager
def unmerged(model: nn.Module) -> Iterator[None]:
    """While open, no tokens merge."""
    with switched(merging_blocks(model) or (), merges=0):
        yield


@contextmanager
def seeing_tokens(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tokens]]:
    """While open, a run of the model leaves the tokens that leave the block of a module, by name.

    Those that its MLP has seen have the same sizes and places. Of a model whose tokens do not
    merge nothing is left.
    """
    seen: dict[str, Tokens] = {}
    merging = merging_blocks(model) is not None
    blocks = {name: model.get_submodule(".".join(name.split(".")[:2])) for name in names if merging}
    with watch(blocks, seen.__setitem__, "outputs"):
        yield seen


def merge_tokens(
    model: nn.Module, schedule: Sequence[int], costs: Callable[[int], nn.Module]
) -> nn.Module:
    """Copy a vision transformer of timm's, and let its tokens merge: see :func:`set_merging`."""
    merged = copy.deepcopy(model)
    set_merging(merged, schedule, costs)
    return merged


def set_merging(
    model: nn.Module, schedule: Sequence[int], costs: Callable[[int], nn.Module]
) -> None:
    """Let the tokens of a vision transformer of timm's merge.

    ``schedule`` has the number of merges for each block, ``costs`` makes those of a block from its
    number. Where no token is to merge, the model stays as it is.

    Raises MoeeError: a network without plain attention; more merges than there are pairs of tokens.
    """
    check_mergeable(model)
    check_schedule(model, schedule)
    if any(schedule):
        numbered = enumerate(zip(getattr(model, BLOCKS), schedule, strict=True))
        leading = model.num_prefix_tokens
        blocks = [MergingBlock(block, costs(n), r, leading) for n, (block, r) in numbered]
        setattr(model, BLOCKS, MergingBlocks(*blocks).train(model.training))


def check_mergeable(model: nn.Module) -> None:
    """Refuse a network that is no vision transformer of timm's with plain attention."""
    reason = ""
    if not isinstance(model, VisionTransformer):
        reason = f"a {type(model).__name__}"
    for name, block in () if reason else getattr(model, BLOCKS).named_children():
        if type(block) not in (Block, MergingBlock):
            reason = f"a {type(block).__name__} in {BLOCKS}.{name}"
        elif not (is_plain(block.attn) or isinstance(block.attn, LowRankAttention)):
            reason = f"another {type(block.attn).__name__} in {BLOCKS}.{name}"
    if reason:
        expected = "a vision transformer of timm's with plain attention, to merge its tokens"
        raise MoeeError(expected, reason, 'leave them apart: merging="none"')


def check_schedule(model: nn.Module, schedule: Sequence[int]) -> None:
    """Refuse a ``schedule`` that does not fit the blocks and tokens of a vision transformer."""
    blocks, patches = len(getattr(model, BLOCKS)), model.patch_embed.num_patches
    if len(schedule) != blocks:
        raise MoeeError(f"merges for {blocks} blocks", f"for {len(schedule)}", "give one for each")
    for number, merges in enumerate(schedule):
        if not 0 <= merges <= patches // 2:
            expected = f"at most {patches // 2} merges of the {patches} patches in block {number}"
            raise MoeeError(expected, f"{merges}", "merge fewer, or spread them over the blocks")
        patches -= merges
