"""Extraction: a dense model and calibration images in, a mixture of experts out.

MoEE as published ("Efficient Data Driven Mixture-of-Expert Extraction from Trained Networks",
CVPR 2025), in the order of the paper: record, cluster, cut experts, route. What the paper leaves
open, and what is chosen here, stands in docs/paper.md.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.attention_plan import AttentionPlan, plan_attentions, reduce_attention
from moee_analysis.extraction.budget import Sizes, sized, without_thin
from moee_analysis.extraction.build import build_moe
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.cross_token_fisher import cohering
from moee_analysis.extraction.iterative_pruning import narrowed
from moee_analysis.extraction.plan import LayerPlan, plan_layers
from moee_analysis.extraction.record.accumulate import forget
from moee_analysis.extraction.record.calibration_set import Calibration, Limits
from moee_analysis.extraction.record.memory_estimate import expected
from moee_analysis.extraction.record.recording import check_unchanged
from moee_analysis.extraction.saving.layer_report import LayerReport
from moee_analysis.extraction.saving.provenance import check_dense, load_dense, provenance_of
from moee_analysis.extraction.saving.run_files import FORMAT, fill_run, read_run, write_run
from moee_analysis.extraction.saving.tables import check_reports
from moee_analysis.models.class_names import knows_classes, name_by_folders
from moee_analysis.models.fingerprints import identity
from moee_analysis.models.loading import architecture, find_mlps, unwrapped
from moee_analysis.utils.caches import check_numba_cache
from moee_analysis.utils.distributed import agreed
from moee_analysis.utils.progress import tell, tell_progress
from moee_analysis.utils.storage.folders import scratch_folder
from moee_analysis.utils.storage.in_use import collecting
from moee_analysis.utils.storage.store import check_writable, content_key, kept, present, set_aside


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
        """Return the dense model this run was cut from.

        Raises
        ------
        MoeeError
            Its weights are no longer where they were, or it is not the same model.
        """
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


def load(folder: str | Path, *, dense: nn.Module | None = None) -> Extraction:
    """Load a saved run; needs neither calibration images nor the dense weights.

    Parameters
    ----------
    dense
        The model that the run was made from. Only one that was changed by hand, in ways that no
        argument of ``timm.create_model`` says, has to be given.

    Raises
    ------
    MoeeError
        Missing, truncated, foreign, edited or newer files; facts or tensors that make no sense; a
        network that gives other outputs than the one that was saved.
    """
    saved = read_run(Path(folder), dense=dense)
    facts = saved.facts
    layers = tuple(LayerReport.from_json(layer) for layer in facts["layers"])
    check_reports(layers, saved.model)
    if dense is not None:
        check_dense(dense, facts["provenance"], source="the one given")
    return Extraction(
        saved.model,
        ExtractConfig.from_json(facts["config"]),
        facts["variance_kept"],
        layers,
        facts["provenance"],
        original=dense,
    )


def extract(
    model: nn.Module,
    images: ImageSet,
    config: ExtractConfig | None = None,
    *,
    store: str | Path | None = None,
    limits: Limits | None = None,
) -> Extraction:
    """Take ``model`` apart into a mixture of experts, without training.

    Parameters
    ----------
    model
        A dense timm model; it is not changed. What ``torch.compile`` or ``DataParallel`` have
        wrapped is looked through. One of half or double precision is looked at in single
        precision, and the mixture has its own again.
    images
        Calibration images; their labels are not used.
    config
        Recipe, budget and everything else; None is the default :class:`ExtractConfig`.
    store
        Folder of a content-keyed store: activations, clusters and the result are kept there
        and found again. None keeps nothing. A run that was killed goes on where it was last saved
        in its store.
    limits
        What it may take of memory and disk; None is the default :class:`Limits`.

    Raises
    ------
    MoeeError
        A model without values or of several precisions; no MLPs to convert, too few tokens, a
        budget that cannot be met, a full disk.
    """
    config = (config or ExtractConfig()).resolved()
    model = unwrapped(model)
    check_model(model)
    if config.clustering.reduce == "umap":
        check_numba_cache()
    images = images.limit(config.calibration_images, seed=config.seed)
    limits = limits or Limits()
    if store is None:
        with scratch_folder("store") as root:
            run = _extract(model, images, config, root=root, limits=limits)
    else:
        run = _through_store(model, images, config, root=Path(store), limits=limits)
    return replace(run, original=model)


def check_model(model: nn.Module) -> None:
    """Refuse a model that cannot be taken apart, before anything is computed.

    Raises
    ------
    MoeeError
        It holds no values (on the device "meta") or several precisions; it has no MLPs to convert,
        or no ``pretrained_cfg`` that names its architecture.
    """
    types = {p.dtype for p in model.parameters()}
    if len(types) != 1 or any(p.is_meta for p in model.parameters()):
        found = "tensors without values (meta)" if len(types) == 1 else f"{len(types)} of them"
        raise MoeeError(
            "a model with weights of one precision", found,
            "load its weights; convert it as a whole, as by model.float()",
        )  # fmt: skip
    find_mlps(model)
    architecture(model)


def convert(
    dense: nn.Module,
    images: ImageSet,
    config: ExtractConfig | None = None,
    *,
    store: str | Path | None = None,
) -> nn.Module:
    """Return the model of :func:`extract` alone: the interface that all systems share."""
    return extract(dense, images, config, store=store).model


def _through_store(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path, limits: Limits
) -> Extraction:
    facts = {"model": identity(model).digest, "images": images.fingerprint}
    name = f"run-{content_key(run_format=FORMAT, config=asdict(config), **facts)}"
    run = _found(root / name, model)
    if not agreed(run is not None):
        check_writable(root)
        with collecting() as used:
            made = _extract(model, images, config, root=root, limits=limits)
        about = {"run": _title(made), "uses": sorted(set(used))}
        kept(root, name, lambda folder: fill_run(folder, made.model, made._facts()), about)
        run = load(root / name, dense=model)
    run.model.to(next(model.parameters()).device)
    return run


def _found(folder: Path, model: nn.Module) -> Extraction | None:
    """The run that a store has in ``folder``, if it has; what cannot be loaded is set aside."""
    if not present(folder):
        return None
    seen = folder.lstat()
    try:
        return load(folder, dense=model)
    except MoeeError as error:
        set_aside(folder, error.found, seen=seen)
        return None


def _title(run: Extraction) -> str:
    """What a list of runs calls this one."""
    asked = {"MACs": run.config.macs_reduction, "parameters": run.config.params_reduction}
    saved = [f"−{share:.0%} {kind}" for kind, share in asked.items() if share is not None]
    facts = run.provenance
    images = f"{facts['n_images']} images of {facts['images']}"
    return ", ".join([facts["model"], run.config.recipe, *saved, images, f"seed {run.config.seed}"])


def _extract(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path, limits: Limits
) -> Extraction:
    provenance = provenance_of(model, images, config)
    calibration = Calibration(_in_single_precision(model), images, config, root, limits)
    tell_progress(str(expected(calibration)))
    if not calibration.on_disk:
        tell("the disk has no room for the tokens: every pass over them runs the model again")
    plans, sizes, attentions = _planned(calibration)
    moe = build_moe(calibration, plans, sizes.kept)
    reduce_attention(moe, attentions, sizes.modes)
    check_unchanged(calibration)
    forget(calibration)
    moe.to(next(model.parameters()).dtype)
    if not knows_classes(model):
        name_by_folders(moe, images.classes)
    return Extraction(
        moe,
        config,
        sizes.variance_kept,
        tuple(_report(plan, sizes.kept.get(plan.site.name)) for plan in plans),
        provenance,
    )


def _planned(calibration: Calibration) -> tuple[list[LayerPlan], Sizes, Sequence[AttentionPlan]]:
    """What becomes of every layer, sized to the budget again whenever more is known of it."""
    model, config = calibration.model, calibration.config
    attentions = plan_attentions(model, calibration.images, config, root=calibration.root)
    plans = plan_layers(calibration)
    sizes = sized(model, plans, config, attentions)
    if config.measures_coherence:
        plans = cohering(calibration, plans, sizes.kept)
        sizes = sized(model, plans, config, attentions)
    if config.narrows_unions:
        plans = narrowed(calibration, plans, attentions=attentions)
        sizes = sized(model, plans, config, attentions)
    if config.thin == "dense":
        plans = without_thin(plans, sizes.kept)
    if any(plan.thin for plan in plans):
        sizes = sized(model, plans, config, attentions)
    return plans, sizes, attentions


def _in_single_precision(model: nn.Module) -> nn.Module:
    """The model, or a copy: sums over tokens in half precision would be wrong."""
    if next(model.parameters()).dtype == torch.float32:
        return model
    return copy.deepcopy(model).float()


def _report(plan: LayerPlan, kept: np.ndarray | None) -> LayerReport:
    """What became of a layer whose experts keep ``kept``, bool (experts, hidden)."""
    site, partition = plan.site, plan.partition
    facts = LayerReport(
        site.index,
        site.name,
        site.hidden,
        plan.converted,
        partition.reason,
        noise_share=partition.noise_share,
        thin=plan.thin,
        dense_tokens=plan.dense,
    )
    if kept is None:
        return facts
    sizes = kept.sum(axis=1)
    return replace(
        facts,
        experts=len(sizes),
        route_agreement=partition.route_agreement,
        active_fraction=float(plan.shares @ sizes) / site.hidden,
        union_fraction=float(kept.any(axis=0).mean()),
        sizes=tuple(int(size) for size in sizes),
    )
