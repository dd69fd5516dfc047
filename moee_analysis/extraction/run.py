"""A run: a mixture of experts and where it comes from, saved, loaded, and found in a store.

On disk it is a safetensors and a JSON file. The JSON carries a checksum of itself and of the
tensors, so that what was cut short, edited by hand or put together from two runs is refused.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from moee_analysis.data.disjoint import contents_of
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.saving import rebuild as networks
from moee_analysis.extraction.saving.checks import LayerReport, check_facts, check_reports
from moee_analysis.models.fingerprints import identity
from moee_analysis.models.loading import architecture, load_model
from moee_analysis.models.weights import read_tensors
from moee_analysis.utils.distributed import agreed
from moee_analysis.utils.environment import describe_machine, versions
from moee_analysis.utils.storage import store
from moee_analysis.utils.storage.files import checksum, file_hash, read_json, write_json
from moee_analysis.utils.storage.folders import new_folder
from moee_analysis.utils.storage.refusals import check_place, writing

FORMAT = 7
READABLE = (5, 6, FORMAT)  # 5 had no answers and no arguments of timm, 6 no merging
KIND = "moee run"
TENSORS = "model.safetensors"
FACTS = "run.json"


@dataclass(frozen=True)
class Extraction:
    """A mixture of experts and how it came about.

    ``model`` takes and gives what the dense model does. ``variance_kept`` is the p that was used
    (None: a global budget), ``provenance`` names the model, images and versions, with hashes.
    """

    model: nn.Module = field(repr=False)
    config: ExtractConfig
    variance_kept: float | None
    layers: tuple[LayerReport, ...]
    provenance: dict[str, Any]
    original: nn.Module | None = field(default=None, repr=False, compare=False)

    def dense(self, *, weights: str | Path | None = None) -> nn.Module:
        """Return the dense model this run was cut from; ``weights``: where they are now.

        Raises MoeeError: no such file; another model than the one the run was made from.
        """
        if self.original is not None:
            return self.original
        facts = self.provenance
        file = weights or facts["weights_file"]
        if file is not None and not Path(file).is_file():
            hint = "pass the weights the run was extracted from (--weights FILE)"
            raise MoeeError(f"the dense weights of this run at '{file}'", "no such file", hint)
        model = load_model(facts["model"], weights=file, **facts.get("arguments", {}))
        model.to(getattr(torch, facts.get("dtype", "float32")))
        model.pretrained_cfg = {**model.pretrained_cfg, **networks.describe_inputs(self.model)}
        _check_dense(model, facts, source=file or "hub")
        return model

    def save(self, folder: str | Path) -> None:
        """Save as ``folder`` (one safetensors, one JSON); complete or not at all."""
        check_target(Path(folder))
        with new_folder(Path(folder)) as partial:
            self.fill(partial)

    def fill(self, folder: Path) -> None:
        """Write the two files into an existing ``folder``."""
        tensors = networks.collect_tensors(self.model)
        with writing(folder / TENSORS, wanted=sum(t.nbytes for t in tensors.values())):
            save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
        facts = {
            "kind": KIND,
            "format": FORMAT,
            "model": networks.describe(self.model),
            "tensors_sha256": file_hash(folder / TENSORS),
            "config": asdict(self.config),
            "variance_kept": self.variance_kept,
            "layers": [asdict(layer) for layer in self.layers],
            "provenance": self.provenance,
        }
        facts["checksum"] = checksum(facts)
        # nothing is written that could not be loaded
        check_facts(json.loads(json.dumps(facts)), folder / FACTS)
        write_json(folder / FACTS, facts)


def describe_origin(model: nn.Module, images: ImageSet, config: ExtractConfig) -> dict[str, Any]:
    """Facts of the model and the images that a run is made from, as plain JSON values."""
    found = identity(model)
    return {
        "model": architecture(model),
        "arguments": networks.find_arguments(model),
        "dtype": networks.name_dtype(model),
        "weights_file": model.pretrained_cfg.get("file"),
        "weights_sha256": found.weights,
        "transform_sha256": found.transform,
        "answers": list(found.answers),
        "images": images.name,
        "n_images": len(images),
        "images_sha256": images.fingerprint,
        "contents": contents_of(images),  # hashes of what no evaluation may see
        "seed": config.seed,
        "versions": versions(),
    }


def _check_dense(model: nn.Module, provenance: Mapping[str, Any], *, source: str | Path) -> None:
    """Refuse a model from ``source`` that is not the one the run was made from."""
    found = identity(model)
    expected = replace(
        found,
        weights=provenance["weights_sha256"],
        transform=provenance.get("transform_sha256", found.transform),  # not in format 5
        answers=tuple(provenance.get("answers", found.answers)),
    )
    if difference := expected.difference(found):
        expected = "the dense model this run was extracted from"
        hint = "pass the original weights (--weights FILE), or extract again"
        raise MoeeError(expected, f"{difference} ({source})", hint)


def check_target(folder: Path, *, wanted: int = 0) -> None:
    """Refuse to save over anything but an empty folder or an earlier run, of ``wanted`` bytes."""
    check_place(folder, wanted=wanted)
    if folder.exists() and not folder.is_dir():
        raise MoeeError(f"a folder at '{folder}'", "a file", "choose another place")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if present - {TENSORS, FACTS}:
        found = f"other files there ({', '.join(sorted(present)[:3])})"
        expected = f"'{folder}' to be new, empty, or an earlier run"
        raise MoeeError(expected, found, "choose another folder")


def load(folder: str | Path, *, dense: nn.Module | None = None) -> Extraction:
    """Load a saved run; needs neither calibration images nor the dense weights.

    Only a ``dense`` model that was changed by hand, in ways that no argument of
    ``timm.create_model`` says, has to be given.

    Raises MoeeError: missing, truncated, foreign, edited or newer files; facts or tensors that make
    no sense; a network that gives other outputs than the one that was saved.
    """
    path = Path(folder) / FACTS
    facts, (tensors, _) = _read_facts(path), read_tensors(path.with_name(TENSORS))
    if file_hash(path.with_name(TENSORS)) != facts["tensors_sha256"]:
        expected = f"the tensors that were saved with '{path}'"
        hint = "restore both files, or extract again"
        raise MoeeError(expected, f"another content in {TENSORS}", hint)
    model = networks.rebuild(facts["model"], tensors, dense=dense)
    layers = tuple(map(LayerReport.from_json, facts["layers"]))
    check_reports(layers, model)
    if dense is not None:
        _check_dense(dense, facts["provenance"], source="the one given")
    config = ExtractConfig.from_json(facts["config"])
    p, provenance = facts["variance_kept"], facts["provenance"]
    return Extraction(model, config, p, layers, provenance, original=dense)


def _read_facts(path: Path) -> dict[str, Any]:
    hint = "check the path, restore the file, or extract again"
    facts = read_json(path, expected=f"a run folder with {FACTS} and {TENSORS}", hint=hint)
    if not isinstance(facts, dict) or facts.get("kind") != KIND:
        raise MoeeError(f"the facts of a run in '{path}'", "another JSON file", "check the path")
    if facts.get("format") not in READABLE:
        hint = "load it with the version of this package that saved it"
        raise MoeeError(f"run format {FORMAT} in '{path}'", f"format {facts.get('format')}", hint)
    try:
        content = {key: value for key, value in facts.items() if key != "checksum"}
        if facts.get("checksum") != checksum(content):
            hint = "restore the file, or extract again with other settings"
            raise MoeeError(f"'{path}' as it was saved", "a file edited since then", hint)
        check_facts(facts, path)
    except RecursionError:
        found = "lists too deep in each other"
        raise MoeeError(f"the facts of a run in '{path}'", found, "check the path") from None
    return facts


def through_store(
    extract: Callable[..., Extraction],
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig,
    *,
    root: Path,
) -> Extraction:
    """Return the run of ``model``, ``images`` and ``config`` in a store, or ``extract`` it."""
    facts = {"model": identity(model).digest, "images": images.fingerprint}
    if config.budget_in == "time":
        facts["on"] = describe_machine(str(next(model.parameters()).device))
    folder = root / f"run-{store.content_key(run_format=FORMAT, config=asdict(config), **facts)}"
    run = None
    if store.present(folder):
        seen = folder.lstat()
        try:
            run = load(folder, dense=model)
        except MoeeError as error:
            store.set_aside(folder, error.found, seen=seen)
    if not agreed(run is not None):
        store.check_writable(root)
        with store.collecting() as used:
            run = extract(root=root)
        asked = {"MACs": config.macs_reduction, "parameters": config.params_reduction}
        saved = [f"−{share:.0%} {kind}" for kind, share in asked.items() if share is not None]
        words = [run.provenance["model"], config.recipe, *saved]
        words += [f"{len(images)} images of {images.name}", f"seed {config.seed}"]
        about = {"run": ", ".join(words), "uses": sorted(set(used))}
        store.get_or_build(root, folder.name, run.fill, about)
    run.model.to(next(model.parameters()).device)
    return run
