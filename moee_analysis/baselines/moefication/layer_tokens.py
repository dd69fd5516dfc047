"""The calibration tokens of a layer, and what its MLP makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.record.hooks import Activations, LayerSample
from moee_analysis.extraction.record.recording import record
from moee_analysis.extraction.record.token_kinds import token_plan
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.storage.folders import scratch_folder

BLOCK = 8192  # tokens whose hidden activations are in memory at once


@dataclass(frozen=True)
class LayerTokens:
    """Inputs of one MLP, (tokens, dim), each as common as any other, and the image of each."""

    mlp: nn.Module
    inputs: torch.Tensor
    image: np.ndarray

    @torch.no_grad()
    def hidden(self) -> Iterator[torch.Tensor]:
        """Hidden activations (n, hidden) of all tokens, in order, some at a time."""
        for inputs in self.inputs.split(BLOCK):
            yield self.mlp.act(self.mlp.fc1(inputs))

    def mean(self) -> torch.Tensor:
        """Mean of the hidden activations, float64 (hidden,)."""
        return sum(hidden.double().sum(0) for hidden in self.hidden()) / len(self.inputs)


@contextmanager
def in_folder(store: str | Path | None) -> Iterator[Path]:
    """The folder of the ``store``; None: one that is gone afterwards."""
    if store is not None:
        yield Path(store)
        return
    with scratch_folder("store") as root:
        yield root


def recorded_inputs(
    model: nn.Module,
    images: ImageSet,
    sites: Sequence[MlpSite],
    *,
    tokens: int,
    seed: int,
    root: Path,
) -> Activations:
    """Record the inputs of ``sites`` for about so many ``tokens`` of all ``images`` together."""
    each = max(1, round(tokens / len(images)))
    plan = token_plan(model, [site.name for site in sites], each, seed=seed)
    return record(model, images, sites, plan=plan, root=root, kinds=("inputs",))


def layer_tokens(sample: LayerSample, mlp: nn.Module, *, seed: int = 0) -> LayerTokens:
    """Tokens of a recorded ``sample`` of the inputs of ``mlp``.

    All leading tokens are in it, and few patches: as many of each stay as make them as common as
    they are in the images.
    """
    weight = sample.weight[:]
    chance = np.random.default_rng(seed).random(len(weight))
    rows = np.flatnonzero(chance * weight.max() < weight)
    inputs = torch.from_numpy(sample.inputs[rows]).to(mlp.fc1.weight)
    return LayerTokens(mlp, inputs, sample.image[rows])
