"""Token merging as an optional stage, before all others: how many patches become one, and where.

Of all MACs that are to be saved merging saves a fixed part; of time all, where it pays, by what an
example of it saves. Where it saves that is searched: the schedules tried let a bell of the tokens
that are left merge, of several centres and widths over the blocks, and the one is taken that moves
the predictions least on some calibration images. Nothing is fitted to these beside the choice of
one schedule of a few.
"""

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, product
from pathlib import Path
from typing import Self

import numpy as np
import torch
from torch import nn
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention import AttentionPlan
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import spread_images
from moee_analysis.extraction.prices import measure_saved_time
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import prefix_kinds
from moee_analysis.extraction.run import Extraction
from moee_analysis.models.attention import site_of
from moee_analysis.models.capture import evaluating
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.models.macs import count
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import BLOCKS, check_mergeable, merge_tokens, merging_blocks
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.files import write_json
from moee_analysis.utils.storage.store import content_key, get_or_build

PARTS = {"macs": 0.7, "time": 1.0}  # of the logarithm of the share that is kept
WORTH = 0.6  # of the share of MACs that merging saves, of time: else nothing merges
FEWEST = 0.04  # of an image's patches, in a block where some merge: finding them takes time
CENTRES, WIDTHS = (0.4, 0.5, 0.6), (0.12, 0.2, 0.33)  # of bells, as shares of the depth
STEPS = 1000  # of a bell as high as all tokens; no more than half of them merge in a block
HEIGHTS = range(4 * STEPS)
IMAGES, BATCH = 128, 32
FILE = "merges.json"

Schedule = tuple[int, ...]


def merge_first(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> nn.Module:
    """Copy a dense ``model`` with its tokens merging, as ``config`` says; itself, if none are to.

    Raises MoeeError: a network without plain attention, or one that cannot save so much.
    """
    if config.merging == "none":
        return model
    if config.merges is not None:
        return merge_alike(model, config.merges)
    check_mergeable(model)
    if config.budget_in == "time":
        tried = candidates_in_time(model, images, config, root=root)
    else:
        macs = MergedMacs.of(model, unread=config.unread)
        tried = candidates(model, macs, saved_by_merging(config, macs))
    return merge_by_search(model, images, tried, root=root)


def merge_by_search(
    model: nn.Module, images: ImageSet, tried: Sequence[Schedule], *, root: Path
) -> nn.Module:
    """Copy a vision transformer, its tokens merging by the best of the schedules ``tried``.

    It is searched on some of the ``images`` once, and found again in the store ``root``.
    """
    if len(tried) == 1:
        return merge_alike(model, tried[0])
    facts = {"model": fingerprint(model), "images": images.fingerprint, "tried": tried}

    def build(folder: Path) -> None:
        found = divergences(model, tried, images)
        write_json(folder / FILE, tried[int(np.argmin(found))])

    folder = get_or_build(root, f"merges-{content_key(**facts)}", build)
    return merge_alike(model, json.loads((folder / FILE).read_text()))


def merge_alike(model: nn.Module, schedule: Sequence[int]) -> nn.Module:
    """Copy a vision transformer whose tokens merge by the costs that this project found best.

    These are Ward's, and the attention of CLS, where the prediction is read from that.
    """
    return merge_tokens(model, schedule, lambda _: WardCosts(by_importance=reads_cls(model)))


def recorded_model(run: Extraction) -> nn.Module:
    """The network whose tokens a run was made of: the dense one, its tokens merging as they do."""
    blocks = merging_blocks(run.model)
    return run.dense() if blocks is None else merge_alike(run.dense(), blocks.schedule)


def reads_cls(model: nn.Module) -> bool:
    """Whether the prediction is read from a class token."""
    return "cls" in prefix_kinds(model) and model.global_pool == "token"


def saved_by_merging(config: ExtractConfig, macs: "MergedMacs") -> float:
    """Share of the ``macs`` that merging is to save, of what a ``config`` asks for.

    It is no more than is left to save once as large a share of MACs has gone as of parameters. Of
    a budget in time it is a share of time.
    """
    kept = min(1.0, (1 - config.macs_reduction) * macs.whole / macs.total)
    part = 1 - kept ** PARTS[config.budget_in]
    if config.params_reduction is None:
        return part
    return max(0.0, min(part, 1 - kept / (1 - config.params_reduction)))


def candidates_in_time(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> list[Schedule]:
    """As :func:`candidates`, of a budget of time; no token merges where that saves too little."""
    macs, worth = _time_by_macs(model, images, config, root=root)
    saved = saved_by_merging(config, macs)
    return _without_small_steps(model, macs, saved / worth if worth > WORTH else 0)


def share_of_time(model: nn.Module, tokens: TokenSource, config: ExtractConfig) -> float:
    """Share of a dense model's time that merging its ``tokens`` saves, by the MACs it saves."""
    if (blocks := merging_blocks(tokens.model)) is None:
        return 0.0
    macs, worth = _time_by_macs(model, tokens.images, config, root=tokens.root)
    return worth * macs.saved(blocks.schedule)


def _time_by_macs(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path
) -> "tuple[MergedMacs, float]":
    """MACs, and the share of time over that of these which an example of merging saves."""
    macs = MergedMacs.of(model, unread=config.unread)
    example = _without_small_steps(model, macs, saved_by_merging(config, macs))[-1]
    if not any(example):
        return macs, 0.0
    time = measure_saved_time(model, merge_alike(model, example), images, config, root=root)
    return macs, time / macs.saved(example)


def _without_small_steps(model: nn.Module, macs: "MergedMacs", saved: float) -> list[Schedule]:
    return candidates(model, macs, saved, fewest=round(FEWEST * model.patch_embed.num_patches))


def candidates(
    model: nn.Module, macs: "MergedMacs", saved: float, *, fewest: int = 1
) -> list[Schedule]:
    """Schedules in the form of bells that save a share of ``macs``, each by as few merges as do.

    In a block merge none, or the ``fewest`` or more. Raises MoeeError: merging cannot save so much.
    """
    depth, patches = len(model.blocks), model.patch_embed.num_patches
    found: dict[Schedule, None] = {}  # in order
    for centre, width in product(CENTRES, WIDTHS):
        bell = [math.exp(-(((n / depth - centre) / width) ** 2)) for n in range(depth)]
        fit = partial(scale, bell, patches=patches, fewest=fewest)
        height = bisect_left(HEIGHTS, saved, key=lambda h, fit=fit: macs.saved(fit(h / STEPS)))
        schedule = fit(height / STEPS)
        if macs.saved(schedule) >= saved:
            found[schedule] = None
    if not found:
        expected, hint = f"tokens that save {saved:.1%} of the MACs by merging", "ask for less"
        raise MoeeError(expected, f"{patches} patches in {depth} blocks, which save less", hint)
    return list(found)


def scale(form: Sequence[float], factor: float, patches: int, *, fewest: int = 1) -> Schedule:
    """Merges in each block: a share, ``factor`` times ``form``, of the patches that are left.

    Where they would be less than the ``fewest``, there are none.
    """
    merges = []
    for share in form:
        wanted = min(round(factor * share * patches), patches // 2)
        merges.append(wanted if wanted >= fewest else 0)
        patches -= merges[-1]
    return tuple(merges)


@dataclass(frozen=True)
class MergedMacs:
    """MACs of one image of so many ``tokens``: those that merging saves from, and can save.

    Of the ``whole`` the ``total`` is left without what costs nothing to save: what is spent on the
    last block's patches where only CLS is read. ``attentions`` and ``mlps`` (MACs of a token) are
    of each block.
    """

    whole: int
    total: float
    tokens: int
    attentions: tuple[AttentionPlan, ...]
    mlps: tuple[float, ...]

    @classmethod
    def of(cls, model: nn.Module, *, unread: str) -> Self:
        """Count those of a dense vision transformer; ``unread`` as in ``ExtractConfig``."""
        names = [f"{BLOCKS}.{n}.mlp" for n in range(len(model.blocks))]
        counted = count(model, sites=names)
        tokens = counted.tokens[names[0]]
        mlps = [counted.by_module[name] / tokens for name in names]
        sites = [site_of("attn", block.attn) for block in model.blocks]
        plans = [AttentionPlan(site, tokens, None, bias=False) for site in sites]
        total = float(counted.total)
        if unread == "constant" and reads_cls(model):
            total -= mlps[-1] * tokens + plans[-1].macs(None)
            mlps[-1], plans[-1] = 0.0, replace(plans[-1], queries=model.num_prefix_tokens)
            total += plans[-1].macs(None)
        return cls(counted.total, total, tokens, tuple(plans), tuple(mlps))

    def saved(self, schedule: Schedule) -> float:
        """Share of these MACs that a ``schedule`` saves, but for finding the pairs."""
        gone = list(accumulate(schedule, initial=0))
        saved = sum(mlp * after for mlp, after in zip(self.mlps, gone[1:], strict=True))
        for plan, before in zip(self.attentions, gone[:-1], strict=True):
            saved += plan.macs(None) - replace(plan, tokens=self.tokens - before).macs(None)
        return saved / self.total


def divergences(model: nn.Module, tried: Sequence[Schedule], images: ImageSet) -> np.ndarray:
    """Mean KL divergence of the predictions, in nats, with tokens merging by each schedule.

    On :data:`IMAGES` images from all over ``images``.
    """
    some = images.take(spread_images(len(images), most=IMAGES))
    merged = merge_alike(model, max(tried, key=sum))
    sums, blocks = np.zeros(len(tried)), merging_blocks(merged)
    batches = some.batches(model, batch_size=BATCH)
    with evaluating(model), evaluating(merged):
        for batch in progress(batches, label="merging schedules", total=-(-len(some) // BATCH)):
            x = like(batch, model)
            wanted = _log_chances(model, x)
            for number, schedule in enumerate(tried):
                for block, merges in zip(blocks, schedule, strict=True):
                    block.merges = merges
                found = _log_chances(merged, x)
                sums[number] += float(kl_div(found, wanted, log_target=True, reduction="sum"))
    return sums / len(some)


def _log_chances(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return log_softmax(model(x).reshape(len(x), -1).double(), dim=1)
