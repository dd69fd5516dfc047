"""Which part of a scene each patch token still shows, read by a linear probe."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.linear_model import RidgeClassifier
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.record.token_kinds import kinds_seen
from moee_analysis.measure.knockout.run_interventions import batches_of
from moee_analysis.measure.routing.part_alignment import patch_parts
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import blank
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import all_mlps, moe_names


@dataclass(frozen=True, eq=False)
class Place:
    """The input of a model's last block, where tokens are read.

    ``mlp`` names the block's MLP, ``leading`` tokens are no patches, and ``order`` (rows, columns)
    has the number of the patch token at each place of the image.
    """

    model: nn.Module
    mlp: str
    leading: int = 0
    order: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    @classmethod
    def of(cls, model: nn.Module) -> Place:
        """Find the last block, and how its tokens lie in the image."""
        bare = cls(model, list(all_mlps(model))[-1])
        black = blank(model)
        with evaluating(model):
            grid = bare.entering(black).shape[1:-1]
        leading = len(kinds_seen(model, grid))
        order = patch_places(model, bare.mlp, (1, *grid), leading=leading)
        return cls(model, bare.mlp, leading, order)

    @property
    def block(self) -> str:
        """Name of the block."""
        return self.mlp.rpartition(".")[0]

    def layers_before(self) -> list[int]:
        """Indices of the routed layers that come before the block."""
        names = moe_names(self.model)
        return [layer for layer, name in names.items() if not name.startswith(f"{self.block}.")]

    def entering(self, x: torch.Tensor) -> torch.Tensor:
        """Run the model on ``x`` and return what enters the block, channels last."""
        found: list[torch.Tensor] = []
        block = self.model.get_submodule(self.block)
        hook = block.register_forward_pre_hook(lambda _, args: found.append(args[0]))
        try:
            self.model(x)
        finally:
            hook.remove()
        channels = self.model.get_submodule(self.mlp).fc1.in_features
        return found[-1] if found[-1].shape[-1] == channels else found[-1].movedim(1, -1)

    def patches(self, x: torch.Tensor) -> torch.Tensor:
        """Patch tokens of the images ``x`` that enter the block, row by row: (images, n, dim)."""
        tokens = self.entering(x).flatten(1, -2)
        return tokens[:, self.leading + torch.from_numpy(self.order.ravel())]

    def parts(self, images: ImageSet) -> np.ndarray:
        """Part of every patch, int64 (images, n)."""
        masks = (images.mask(index) for index in range(len(images)))
        return np.stack([patch_parts(m, self.order.shape, len(images.parts)) for m in masks])


@dataclass(frozen=True, eq=False)
class PartProbe:
    """Says of images which part each patch shows, by a probe of their tokens at a place."""

    place: Place
    probe: RidgeClassifier

    @classmethod
    def trained(cls, place: Place, images: ImageSet, batch_size: int | None) -> PartProbe:
        """Train on ``images``; every part weighs the same."""
        from sklearn.linear_model import RidgeClassifier

        found = batches_of(place.model, images, batch_size, label="tokens for the probe")
        with evaluating(place.model):
            tokens = np.concatenate([_flat(place.patches(x)) for x in found])
        probe = RidgeClassifier(class_weight="balanced")
        return cls(place, probe.fit(tokens, place.parts(images).ravel()))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Part of every patch, int64 (images, n), on the CPU."""
        told = self.probe.predict(_flat(self.place.patches(x)))
        return torch.from_numpy(told).reshape(len(x), -1)


def _flat(patches: torch.Tensor) -> np.ndarray:
    return patches.flatten(0, 1).float().cpu().numpy()
