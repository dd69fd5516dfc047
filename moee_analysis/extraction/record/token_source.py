"""The tokens of the calibration images, a part of the images at a time.

Where the disk has room, all parts are recorded once and read again by every pass; where it has not,
every pass runs the model again. The tokens are the same, whichever it is.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.record.recording import Recording, load_sample
from moee_analysis.extraction.record.tokens import (
    RecordedLayer,
    TokenPlan,
    leading_kinds,
    token_plan,
)
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.loading import MlpSite, find_mlps
from moee_analysis.models.merging import merging_blocks
from moee_analysis.utils.checks import not_none, real_number
from moee_analysis.utils.distributed import own_share, processes
from moee_analysis.utils.environment import nearest_folder
from moee_analysis.utils.storage.store import content_key, present

PART = 128  # images, whole batches of them
LARGEST = 1e18  # bytes of memory or disk


@dataclass(frozen=True)
class Limits:
    """What an extraction may take of a machine; its result does not depend on it.

    ``memory`` bytes of sums are held at once; more of them take more passes over the tokens. Where
    these take more than ``disk`` bytes (None: half of what is free), every pass makes them again.
    """

    memory: float = 4e9
    disk: float | None = None

    def __post_init__(self) -> None:
        real_number("memory", self.memory, above=0, most=LARGEST)
        for name, value in not_none(self, "disk"):
            real_number(name, value, least=0, most=LARGEST)


@dataclass(frozen=True)
class TokenSource:
    """The sampled tokens of all MLPs on some images, of the ``kinds`` that are recorded.

    ``root`` is the store that holds them. Of several processes each has whole parts of its own.
    Only parts with the images of these ``numbers`` are seen; None: all.
    """

    model: nn.Module
    images: ImageSet
    plan: TokenPlan
    kinds: tuple[str, ...]
    root: Path
    limits: Limits = Limits()
    numbers: tuple[int, ...] | None = None

    @cached_property
    def sites(self) -> tuple[MlpSite, ...]:
        """All MLPs of the model."""
        return tuple(find_mlps(self.model))

    @cached_property
    def key(self) -> str:
        """Key of all tokens of all processes in a store."""
        facts = {"model": fingerprint(self.model), "images": self.images.fingerprint}
        return content_key(kinds=self.kinds, plan=self.plan.facts, **facts)

    @cached_property
    def leading(self) -> dict[str, tuple[str, ...]]:
        """The kinds of the leading tokens that each site sees, by its name."""
        return leading_kinds(self.model, [site.name for site in self.sites])

    @property
    def own(self) -> list[range]:
        """Numbers of the images of each part of this process."""
        numbers = range(len(self.images))
        parts = [numbers[start : start + PART] for start in numbers[::PART]]
        return [parts[number] for number in own_share(len(parts))]

    @property
    def chosen(self) -> list[range]:
        """Those of them that are seen."""
        if self.numbers is None:
            return self.own
        return [part for part in self.own if any(number in part for number in self.numbers)]

    def parts(
        self, sites: Sequence[MlpSite], *, gradients: bool = False, skip: int = 0
    ) -> Iterator[dict[str, RecordedLayer]]:
        """Yield the tokens of ``sites``, by name, of all but the first ``skip`` parts, in turn.

        Parts that are not on the disk have gradients only where these are needed.
        """
        kept, first = self.whole.kept, self.own[0].start if self.own else 0
        for part in self.chosen[skip:]:
            if self._folder is None:
                samples = self._recording(part, sites, gradients=gradients).in_memory()
            else:
                samples = {site.name: load_sample(self._folder, site) for site in sites}
                for name, sample in samples.items():
                    rows = slice(*((n - first) * kept[name] for n in (part.start, part.stop)))
                    samples[name] = sample.part(rows)
            yield {s.name: RecordedLayer(s, s.module(self.model), samples[s.name]) for s in sites}

    @cached_property
    def on_disk(self) -> bool:
        """Whether the tokens of this process are, or will be, recorded on the disk."""
        room = self.limits.disk
        if room is None:
            room = shutil.disk_usage(nearest_folder(self.root)).free / 2
        there = present(self.whole.folder(self.root))
        return there or self.whole.bytes <= room / processes()

    @cached_property
    def _folder(self) -> Path | None:
        """Where all parts of this process are recorded; None where there is no room for them."""
        return self.whole.to_disk(self.root) if self.on_disk else None

    @cached_property
    def whole(self) -> Recording:
        """All tokens of this process, recorded or not."""
        numbers = range(self.own[0].start, self.own[-1].stop) if self.own else range(0)
        return self._recording(numbers, self.sites)

    def _recording(
        self, numbers: range, sites: Sequence[MlpSite], *, gradients: bool = True
    ) -> Recording:
        kinds = tuple(kind for kind in self.kinds if gradients or kind != "gradients")
        plan = replace(self.plan, first=numbers.start)
        return Recording(self.model, self.images.take(numbers), tuple(sites), plan, kinds)


def calibration_tokens(
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig,
    *,
    root: Path,
    limits: Limits | None = None,
) -> TokenSource:
    """Return the tokens that a run of ``config`` is calibrated on, of some of the ``images``."""
    kinds = ("inputs", "hidden")
    if config.needs_gradients:
        kinds = ("inputs", "gradients")
    elif config.tokens_per_image is None:  # too many to keep their hidden activations too
        kinds = ("inputs",)
    if merging_blocks(model) is not None:
        kinds += ("sizes",)
    names = [site.name for site in find_mlps(model)]
    plan = token_plan(model, names, config.tokens_per_image, seed=config.seed)
    images = images.limit(config.calibration_images, seed=config.seed)
    return TokenSource(model, images, plan, kinds, root, limits or Limits())
