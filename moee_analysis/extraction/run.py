"""A run: a mixture of experts and how it came about, saved, loaded, and found in a store."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.saving.layer_report import LayerReport
from moee_analysis.extraction.saving.provenance import check_dense, load_dense
from moee_analysis.extraction.saving.run_files import FORMAT, fill_run, read_run, write_run
from moee_analysis.extraction.saving.tables import check_reports
from moee_analysis.models.fingerprints import identity
from moee_analysis.utils.distributed import agreed
from moee_analysis.utils.storage.store import (
    check_writable,
    collecting,
    content_key,
    get_or_build,
    present,
    set_aside,
)


@dataclass(frozen=True)
class Extraction:
    """A mixture of experts and how it came about.

    ``model`` takes and gives what the dense model does. ``variance_kept`` is the p that was
    used (None: a global budget), ``provenance`` names the model, images and versions, with their
    hashes.
    """

    model: nn.Module = field(repr=False)
    config: ExtractConfig
    variance_kept: float | None
    layers: tuple[LayerReport, ...]
    provenance: dict[str, Any]
    original: nn.Module | None = field(default=None, repr=False, compare=False)

    def dense(self, *, weights: str | Path | None = None) -> nn.Module:
        """Return the dense model this run was cut from; ``weights``: where they are now."""
        if self.original is not None:
            return self.original
        return load_dense(self.provenance, weights, like=self.model)

    def save(self, folder: str | Path) -> None:
        """Save as ``folder`` (one safetensors, one JSON); complete or not at all."""
        write_run(Path(folder), self.model, self._facts())

    def _facts(self) -> dict[str, Any]:
        return {
            "config": asdict(self.config),
            "variance_kept": self.variance_kept,
            "layers": [asdict(layer) for layer in self.layers],
            "provenance": self.provenance,
        }

    @property
    def _title(self) -> str:
        """What a list of runs calls this one."""
        asked = {"MACs": self.config.macs_reduction, "parameters": self.config.params_reduction}
        saved = [f"−{share:.0%} {kind}" for kind, share in asked.items() if share is not None]
        facts = self.provenance
        images = f"{facts['n_images']} images of {facts['images']}"
        seed = f"seed {self.config.seed}"
        return ", ".join([facts["model"], self.config.recipe, *saved, images, seed])


def load(folder: str | Path, *, dense: nn.Module | None = None) -> Extraction:
    """Load a saved run; needs neither calibration images nor the dense weights.

    Only a ``dense`` model that was changed by hand, in ways that no argument of
    ``timm.create_model`` says, has to be given.

    Raises
    ------
    MoeeError
        Missing, truncated, foreign, edited or newer files; facts or tensors that make no sense; a
        network that gives other outputs than the one that was saved.
    """
    model, facts = read_run(Path(folder), dense=dense)
    layers = tuple(LayerReport.from_json(layer) for layer in facts["layers"])
    check_reports(layers, model)
    if dense is not None:
        check_dense(dense, facts["provenance"], source="the one given")
    config = ExtractConfig.from_json(facts["config"])
    p, provenance = facts["variance_kept"], facts["provenance"]
    return Extraction(model, config, p, layers, provenance, original=dense)


def through_store(
    extract: Callable[[], Extraction],
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig,
    *,
    root: Path,
) -> Extraction:
    """Return the run of ``model``, ``images`` and ``config`` in a store, or ``extract`` it."""
    facts = {"model": identity(model).digest, "images": images.fingerprint}
    name = f"run-{content_key(run_format=FORMAT, config=asdict(config), **facts)}"
    run = _find(root / name, model)
    if not agreed(run is not None):
        check_writable(root)
        with collecting() as used:
            made = extract()
        about = {"run": made._title, "uses": sorted(set(used))}
        get_or_build(root, name, lambda folder: fill_run(folder, made.model, made._facts()), about)
        run = load(root / name, dense=model)
    run.model.to(next(model.parameters()).device)
    return run


def _find(folder: Path, model: nn.Module) -> Extraction | None:
    """The run in ``folder``, if there is one; what cannot be loaded is set aside."""
    if not present(folder):
        return None
    seen = folder.lstat()
    try:
        return load(folder, dense=model)
    except MoeeError as error:
        set_aside(folder, error.found, seen=seen)
        return None
