"""The systems that `inference.py` times, beside the dense model."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fidelity import Bench, Point
from figures import SEVERAL
from torch import nn

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction, load
from moee_analysis.models.fingerprints import hash_weights
from moee_analysis.models.loading import architecture

Run = Extraction | nn.Module

SYSTEMS = {  # as they are called in fidelity.py
    "static pruning": "fisher OBS", "ToMe": "ToMe", "merging alone": "merging alone",
    "best": "best", "best, attention too": "best, attention too",
    "best, all three": "best, all three",
    "best, in time": "best, all three", "best, in time of one": "best, all three",
}  # fmt: skip
IN_TIME = {"best, in time": 64, "best, in time of one": 1}  # by a budget of time of such batches


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
                runs[name + budget] = _make(bench, name, Point(saved), asked.seed)
            except MoeeError as error:  # as of networks without plain attention
                print(f"left out: {error}", flush=True)
    return runs


def _make(bench: Bench, name: str, point: Point, seed: int) -> Run:
    if name not in IN_TIME:
        return bench.extracted(SYSTEMS[name], point, seed)
    config = bench.config(SYSTEMS[name], point, seed)
    config = replace(config, budget_in="time", for_batch=IN_TIME[name])
    return extract(bench.model, bench.calibration, config, store=bench.store)
