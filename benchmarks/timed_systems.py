"""The systems that `inference.py` times, beside the dense model."""

from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fidelity import Bench, Point
from figures import SEVERAL
from torch import nn

from moee_analysis.baselines import token_merging
from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig, preset_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction, load
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import architecture
from moee_analysis.models.merging import check_mergeable

MERGES = (0, 0, 8, 16, 16, 16, 16, 12, 8, 8, 4, 0)  # of 196 patches, in each of 12 blocks


@dataclass(frozen=True)
class Merged:
    """A model whose tokens merge without any extraction, and how."""

    model: nn.Module
    config: token_merging.TokenMergingConfig


Run = Extraction | Merged


def tome(bench: Bench, saved: float, seed: int) -> Merged:
    """Token merging, by which so large a share of the MACs is saved."""
    config = token_merging.TokenMergingConfig(macs_reduction=saved, seed=seed)
    return Merged(token_merging.convert(bench.model, bench.calibration, config), config)


def all_three(bench: Bench, saved: float, seed: int) -> Extraction:
    """Experts, smaller heads and merged tokens."""
    check_mergeable(bench.model)
    config = ExtractConfig(
        recipe="best", macs_reduction=saved, preset=bench.preset, seed=seed, attention="low_rank",
        merging="budget", merges=merges_for(bench.model),
    )  # fmt: skip
    return extract(bench.model, bench.calibration, config, store=bench.store)


def merges_for(dense: nn.Module) -> tuple[int, ...]:
    """The share of the patches that :data:`MERGES` merges, in a network of another size."""
    blocks, patches = len(dense.blocks), dense.patch_embed.num_patches
    scale = len(MERGES) / blocks * patches / 196
    return tuple(int(scale * MERGES[n * len(MERGES) // blocks]) for n in range(blocks))


def _named(name: str) -> Callable[[Bench, float, int], Extraction]:
    return lambda bench, saved, seed: bench.extracted(name, Point(saved), seed)


SYSTEMS: dict[str, Callable[[Bench, float, int], Run]] = {
    "static pruning": _named("fisher OBS"), "token merging": tome, "best": _named("best"),
    "best, attention too": _named("best, attention too"), "best, attention and merging": all_three,
}  # fmt: skip


def load_runs(folders: Sequence[Path], dense: nn.Module) -> dict[str, Extraction]:
    """Saved runs of the model ``dense``, called as their folders are."""
    runs = {folder.resolve().name: load(folder) for folder in folders}
    if len(runs) < len(folders):
        raise MoeeError("runs in folders of different names", ", ".join(runs), "rename the folders")
    for name, each in runs.items():
        if each.provenance["weights_sha256"] != hash_weights(dense):
            raise MoeeError(
                f"a run of this {architecture(dense)}", f"'{name}' of other weights",
                "pass the --model and --weights it was extracted from",
            )  # fmt: skip
        each.model.to(next(dense.parameters()).device)
    return runs


def extract_runs(asked: Namespace, dense: nn.Module, images: ImageSet) -> dict[str, Run]:
    """Every system at every budget of MACs, with what the store has."""
    limit = preset_named(asked.preset).calibration_images
    calibration = load_images(asked.calibration, split="calibration", limit=limit)
    check_disjoint(calibration, images, use="used for calibration")
    bench = Bench(dense, calibration, images, asked.preset, asked.store)
    runs = {}
    for saved in asked.macs_reduction:
        budget = f"{SEVERAL}{100 * saved:g} %" if len(asked.macs_reduction) > 1 else ""
        for name in asked.systems:
            print(f"making: {name}{budget}", flush=True)
            try:
                runs[name + budget] = SYSTEMS[name](bench, saved, asked.seed)
            except MoeeError as error:  # as of networks without plain attention
                print(f"left out: {error}", flush=True)
    return runs
