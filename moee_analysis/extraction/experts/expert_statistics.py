"""What is known of the tokens of each expert: counts, means, variances and metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from moee_analysis.extraction.cluster.assignment import Assignment, by_expert
from moee_analysis.extraction.record.accumulate import Sums, summed
from moee_analysis.extraction.record.calibration_set import Calibration
from moee_analysis.extraction.record.fisher import expert_metrics, products
from moee_analysis.extraction.record.layer_tokens import Recorded
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.distributed import agreed
from moee_analysis.utils.storage.store import content_key, kept, present


@dataclass(frozen=True)
class ExpertStatistics:
    """The tokens of each expert of a layer.

    ``routed`` (experts,) is how many tokens go to each, ``weight`` (experts,) how many count for
    it; ``means`` and ``variance`` (experts, hidden) are those of the hidden activations of the
    latter; all float64. ``metrics`` (experts, dim, dim) float32, those of
    ``expert_metrics``; None where errors of the outputs count alike.
    """

    routed: np.ndarray
    weight: np.ndarray
    means: np.ndarray
    variance: np.ndarray
    metrics: np.ndarray | None = None

    def of(self, chosen: np.ndarray) -> ExpertStatistics:
        """Those of the ``chosen`` experts, bool (experts,)."""
        if chosen.all():
            return self  # metrics stay on the disk
        return ExpertStatistics(*(None if v is None else v[chosen] for v in vars(self).values()))


@dataclass(frozen=True)
class ExpertTally:
    """Adds up the tokens of every expert of a layer."""

    site: MlpSite
    assignment: Assignment
    gradients: bool

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of sums over tokens, over activations and their squares, and of products of gradients.

        ``kinds`` are products over all tokens of a kind, leading or other ones.
        """
        experts, hidden, dim = self.assignment.experts, self.site.hidden, self.site.dim
        shapes = {"routed": (experts,), "weight": (experts,)}
        shapes |= {"hidden": (experts, hidden), "squares": (experts, hidden)}
        if self.gradients:
            shapes |= {"fisher": (experts, dim, dim), "kinds": (2, dim, dim), "of_kinds": (2,)}
        return shapes

    @property
    def facts(self) -> dict[str, Any]:
        """What decides the sums."""
        return {"experts": self.assignment.digest, "gradients": self.gradients}

    def add(self, sums: Sums, layer: Recorded) -> None:
        """Add a part of the tokens."""
        weight = layer.sample.weight.astype(np.float64)
        routed, members = self.assignment.of(layer)
        sums["routed"] += torch.from_numpy(_counted(routed, weight, len(sums["routed"])))
        for rows in layer.chunks():
            self._add_hidden(sums, layer, rows, members[rows])
        if self.gradients:
            self._add_gradients(sums, layer, members)

    def _add_hidden(self, sums: Sums, layer: Recorded, rows: slice, members: np.ndarray) -> None:
        weight = layer.sample.weight[rows].astype(np.float64)
        sums["weight"] += torch.from_numpy(_counted(members, weight, len(sums["weight"])))
        hidden = np.asarray(layer.sample.hidden[rows], dtype=np.float64)
        for expert, own in enumerate(by_expert(members, len(sums["weight"]))):
            if len(own):
                values, counts = torch.from_numpy(hidden[own]), torch.from_numpy(weight[own])
                sums["hidden"][expert] += counts @ values
                sums["squares"][expert] += counts @ values.square_()

    def _add_gradients(self, sums: Sums, layer: Recorded, members: np.ndarray) -> None:
        for expert, own in enumerate(by_expert(members, len(sums["weight"]))):
            sums["fisher"][expert] += products(layer.sample, own)
        kinds = (layer.sample.position >= len(self.assignment.prefix)).astype(int)
        weight = layer.sample.weight.astype(np.float64)
        sums["of_kinds"] += torch.from_numpy(_counted(kinds, weight, 2))
        for kind, own in enumerate(by_expert(kinds, 2)):
            sums["kinds"][kind] += products(layer.sample, own)


def _counted(experts: np.ndarray, weight: np.ndarray, count: int) -> np.ndarray:
    """Sum of the weights of the tokens of each expert, those of -1 left out."""
    return np.bincount(experts + 1, weights=weight, minlength=count + 1)[1:]


def statistics_of(tally: ExpertTally, sums: Sums) -> ExpertStatistics:
    """What the ``sums`` of a tally say."""
    divisor = sums["weight"].clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    means = sums["hidden"] / divisor
    variance = (sums["squares"] / divisor - means**2).clamp_min(0)
    metrics = None
    if tally.gradients:
        kinds = tally.assignment.kinds
        metrics = expert_metrics(sums, kinds).float().numpy()
    plain = [t.numpy() for t in (sums["routed"], sums["weight"], means, variance)]
    return ExpertStatistics(*plain, metrics)


def gathered(
    calibration: Calibration, assignments: Mapping[str, Assignment]
) -> dict[str, ExpertStatistics]:
    """Statistics of the experts of some layers, by site name, or found in the store.

    Experts are numbered as in the ``assignments``, also those without tokens.
    """
    gradients = calibration.config.metric == "fisher"
    sites = {site.name: site for site in calibration.sites}
    tallies = [ExpertTally(sites[name], each, gradients) for name, each in assignments.items()]
    folders = {tally.site.name: _folder(calibration, tally) for tally in tallies}
    missing = [tally for tally in tallies if not agreed(present(folders[tally.site.name]))]
    for tally, sums in summed(calibration, missing, label="statistics of experts"):
        _keep(folders[tally.site.name], statistics_of(tally, sums))
    return {name: _load(folder) for name, folder in folders.items()}


def _folder(calibration: Calibration, tally: ExpertTally) -> Path:
    key = content_key(tokens=calibration.key, site=tally.site.name, **tally.facts)
    return calibration.root / f"statistics-{key}"


def _keep(folder: Path, known: ExpertStatistics) -> None:
    def build(partial: Path) -> None:
        for name, values in vars(known).items():
            if values is not None:
                np.save(partial / f"{name}.npy", values)

    kept(folder.parent, folder.name, build)


def _load(folder: Path) -> ExpertStatistics:
    """Metrics stay on the disk until they are used."""
    names = [f.name for f in fields(ExpertStatistics) if (folder / f"{f.name}.npy").exists()]
    return ExpertStatistics(
        **{
            name: np.load(folder / f"{name}.npy", mmap_mode="r" if name == "metrics" else None)
            for name in names
        }
    )
