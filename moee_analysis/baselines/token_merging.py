"""Token merging without calibration: the patches of an image that are alike become one.

Source: Bolya et al., "Token Merging: Your ViT But Faster" (ToMe), ICLR 2023: in every block the
same number of tokens merge, by the cosine of their keys, and attention is proportional to what a
token stands for. ToMeCIS (Seol et al., "Token Merging with Class Importance Score", IECON 2023) is
made by its abstract alone: merged tokens are means weighted by the attention that CLS pays.
"""

from bisect import bisect_left
from dataclasses import dataclass
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
    blocks, patches = len(dense.blocks), dense.patch_embed.num_patches
    total = count(dense, sites=()).total

    def merged(merges: int) -> nn.Module:
        schedule = constant_schedule(merges, blocks, patches)
        return merge_tokens(dense, schedule, lambda _: KeyCosts(by_importance=by_importance))

    def saved(merges: int) -> float:
        return 1 - count(merged(merges), sites=()).total / total

    most, asked = blocks * (patches // 2), config.macs_reduction
    if saved(most) < asked:
        found = f"at most {saved(most):.1%}, with all tokens merged that can be"
        raise MoeeError(f"a MACs reduction of {asked:.1%}", found, "ask for less")
    return merged(bisect_left(range(most), asked, key=saved))


def constant_schedule(merges: int, blocks: int, patches: int) -> tuple[int, ...]:
    """So many ``merges`` of an image's patches over the blocks, as many in each as can be.

    The first blocks merge one token more than the last where they do not divide evenly; a block of
    few tokens merges half of them.
    """
    schedule = []
    for number in range(blocks):
        each = merges // blocks + (number < merges % blocks)
        schedule.append(min(each, patches // 2))
        patches -= schedule[-1]
    return tuple(schedule)
