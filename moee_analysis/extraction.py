"""Extraction: a dense model and calibration images in, a mixture of experts out.

MoEE as published ("Efficient Data Driven Mixture-of-Expert Extraction from Trained Networks",
CVPR 2025), in the order of the paper: record, cluster, cut experts, route. What the paper leaves
open, and what is chosen here, stands in docs/paper.md.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moee_analysis.attention_planning import plan_attentions, reduce_attention
from moee_analysis.building import build_moe
from moee_analysis.calibration import Calibration, Limits
from moee_analysis.coherence import cohering
from moee_analysis.config import ExtractConfig
from moee_analysis.distributed import agreed
from moee_analysis.environment import versions
from moee_analysis.errors import MoeeError
from moee_analysis.memory import expected
from moee_analysis.models import architecture, fingerprint, load_model
from moee_analysis.narrowing import narrowed
from moee_analysis.planning import LayerPlan, plan_layers
from moee_analysis.progress import tell, tell_progress
from moee_analysis.recording import check_unchanged
from moee_analysis.saving import FORMAT, fill_run, read_run, rebuilds, write_run
from moee_analysis.sizing import sized, without_thin
from moee_analysis.store import content_key, kept
from moee_analysis.sums import forget

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from moee_analysis.images import ImageSet


@dataclass(frozen=True)
class LayerReport:
    """What became of one MLP layer.

    ``noise_share`` is the share of clustered tokens in no cluster, ``route_agreement`` the share
    of clustered tokens that the router sends to their own cluster, ``active_fraction`` the
    expected share of hidden neurons a token uses, ``union_fraction`` the share still stored. A
    layer that is ``thin`` stays dense because its experts would save too little. The tokens of the
    kinds in ``dense_tokens`` keep all neurons.
    """

    index: int
    name: str
    hidden: int
    converted: bool
    reason: str
    experts: int = 0
    noise_share: float = 0.0
    route_agreement: float = 1.0
    active_fraction: float = 1.0
    union_fraction: float = 1.0
    sizes: tuple[int, ...] = ()
    thin: bool = False
    dense_tokens: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> LayerReport:
        """Rebuild a report from ``dataclasses.asdict`` after a trip through JSON."""
        lists = {name: tuple(content.get(name, ())) for name in ("sizes", "dense_tokens")}
        return cls(**content | lists)


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
            Its weights are no longer where they were, or are not the same.
        """
        if self.original is not None:
            return self.original
        return _load_dense(self.provenance, weights)

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


def load(folder: str | Path) -> Extraction:
    """Load a saved run; needs neither calibration images nor the dense weights.

    Raises
    ------
    MoeeError
        Missing, truncated, foreign, edited or newer files.
    """
    saved = read_run(Path(folder))
    facts = saved.facts
    return Extraction(
        saved.model,
        ExtractConfig.from_json(facts["config"]),
        facts["variance_kept"],
        tuple(LayerReport.from_json(layer) for layer in facts["layers"]),
        facts["provenance"],
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
        A dense timm model; it is not changed.
    images
        Calibration images; their labels are not used.
    config
        Recipe, budget and everything else; None is the default :class:`ExtractConfig`.
    store
        Folder of a content-keyed store: activations, clusters and the result are kept there
        and found again (the result only of a model that its timm name rebuilds). None keeps
        nothing. A run that was killed goes on where it was last saved in its store.
    limits
        What it may take of memory and disk; None is the default :class:`Limits`.

    Raises
    ------
    MoeeError
        No MLPs to convert, too few tokens, a budget that cannot be met, a full disk.
    """
    config = (config or ExtractConfig()).resolved()
    images = images.limit(config.calibration_images, seed=config.seed)
    limits = limits or Limits()
    if store is None:
        with tempfile.TemporaryDirectory(prefix="moee-") as root:
            return _extract(model, images, config, root=Path(root), limits=limits)
    if not rebuilds(model):
        return _extract(model, images, config, root=Path(store), limits=limits)
    return _through_store(model, images, config, root=Path(store), limits=limits)


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
    facts = {"model": fingerprint(model), "images": images.fingerprint, "config": asdict(config)}
    name = f"run-{content_key(run_format=FORMAT, **facts)}"
    if not agreed((root / name).is_dir()):
        made = _extract(model, images, config, root=root, limits=limits)
        kept(root, name, lambda folder: fill_run(folder, made.model, made._facts()))
    run = load(root / name)
    run.model.to(next(model.parameters()).device)
    return replace(run, original=model)


def _extract(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, root: Path, limits: Limits
) -> Extraction:
    provenance = _provenance(model, images, config)
    calibration = Calibration(model, images, config, root, limits)
    tell_progress(str(expected(calibration)))
    if not calibration.on_disk:
        tell("the disk has no room for the tokens: every pass over them runs the model again")
    attentions = plan_attentions(model, images, config, root=root)
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
    moe = build_moe(calibration, plans, sizes.kept)
    reduce_attention(moe, attentions, sizes.modes)
    check_unchanged(calibration)
    forget(calibration)
    return Extraction(
        moe,
        config,
        sizes.variance_kept,
        tuple(_report(plan, sizes.kept.get(plan.site.name)) for plan in plans),
        provenance,
        original=model,
    )


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


def _provenance(model: nn.Module, images: ImageSet, config: ExtractConfig) -> dict[str, Any]:
    return {
        "model": architecture(model),
        "weights_file": model.pretrained_cfg.get("file"),
        "weights_sha256": fingerprint(model),
        "images": images.name,
        "n_images": len(images),
        "images_sha256": images.fingerprint,
        "seed": config.seed,
        "versions": versions(),
    }


def _load_dense(provenance: dict[str, Any], weights: str | Path | None) -> nn.Module:
    file = weights or provenance["weights_file"]
    if file is not None and not Path(file).is_file():
        raise MoeeError(
            f"the dense weights of this run at '{file}'", "no such file",
            "pass the weights the run was extracted from (--weights FILE)",
        )  # fmt: skip
    model = load_model(provenance["model"], weights=file)
    if fingerprint(model) != provenance["weights_sha256"]:
        raise MoeeError(
            "the dense weights this run was extracted from", f"other weights ({file or 'hub'})",
            "pass the original weights (--weights FILE), or extract again",
        )  # fmt: skip
    return model
