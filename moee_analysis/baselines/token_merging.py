"""Token merging without calibration: the patches of an image that are alike become one.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ToMe), ICLR 2023: in every block the
same number of tokens merge, by the cosine of their keys, and attention is proportional to what a
token stands for. ToMeCIS (Seol et al., "Token Merging with Class Importance Score", IECON 2023) is
made by its abstract alone: merged tokens are means weighted by the attention that CLS pays.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import nn

from moee_analysis.baselines.common.exchange import Store
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.models.macs import count
from moee_analysis.models.merge_costs import KeyCosts
from moee_analysis.models.merging import check_mergeable, merge_tokens
from moee_analysis.utils import checks


@dataclass(frozen=True)
class TokenMergingConfig:
    """How tokens merge.

    - ``weights`` of tokens in the mean of those that merge: the patches that they stand for
      (``sizes``), or the attention that the class token pays them (``importance``).
    - ``macs_reduction``: share of all MACs to save, by the fewest merges of an image that do.
    - ``seed``: without effect, since nothing is drawn.

    Raises ``MoeeError``: a setting out of its range.
    """

    weights: Literal["sizes", "importance"] = "sizes"
    macs_reduction: float = 0.28
    seed: int = 0

    def __post_init__(self) -> None:
        checks.one_of("weights", self.weights, checks.choices_of(type(self))["weights"])
        checks.share("macs_reduction", self.macs_reduction, whole=False)
        checks.seed_number(self.seed)


def convert(
    dense: nn.Module, images: ImageSet, config: TokenMergingConfig, *, store: Store = None
) -> nn.Module:
    """Let the tokens of a copy of ``dense`` merge; ``images`` and ``store`` are not looked at.

    Raises ``MoeeError``: a network without plain attention, or without a class token whose
    attention could count; a budget that cannot be met.
    """
    check_mergeable(dense)
    by_importance = config.weights == "importance"
    if by_importance and dense.cls_token is None:
        expected, hint = "a network with a class token", 'weights="sizes" needs none'
        raise MoeeError(expected, f"a {type(dense).__name__} without one", hint)
    merge = partial(merge_tokens, dense, costs=lambda _: KeyCosts(by_importance=by_importance))
    return merge(_fewest(dense, merge, config.macs_reduction))


def _fewest(dense: nn.Module, merge: partial, saved: float) -> tuple[int, ...]:
    """The schedule of the fewest merges that saves so much, found by bisection."""
    total, schedules = count(dense, sites=()).total, list(constant_schedules(dense))

    def saves(schedule: tuple[int, ...]) -> float:
        return 1 - count(merge(schedule), sites=()).total / total

    low, high = 0, len(schedules) - 1
    if (most := saves(schedules[high])) < saved:
        found = f"at most {most:.1%}, with all tokens merged that can be"
        raise MoeeError(f"a MACs reduction of {saved:.1%}", found, "ask for less")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saves(schedules[middle]) >= saved else (middle + 1, high)
    return schedules[low]


def constant_schedules(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """Yield schedules of one merge more from one to the next, as many in each block as can be.

    The first blocks merge one token more than the last where the sum does not divide evenly; a
    block of few tokens merges half of them.
    """
    blocks, before = len(model.blocks), None
    for total in range(blocks * model.patch_embed.num_patches // 2 + 1):
        each, more = divmod(total, blocks)
        schedule, patches = [], model.patch_embed.num_patches
        for number in range(blocks):
            schedule.append(min(each + (number < more), patches // 2))
            patches -= schedule[-1]
        if schedule != before:
            yield tuple(schedule)
        before = schedule
