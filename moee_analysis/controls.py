"""Controls: what a claim about routing has to beat."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING

from moee_analysis.extraction import Extraction, extract
from moee_analysis.layers import moe_layers
from moee_analysis.routers import RandomRouter

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from moee_analysis.images import ImageSet


def randomly_routed(run: Extraction, *, seed: int = 0) -> nn.Module:
    """Copy the run's model and send every token to a random expert, as often as calibration did.

    It costs what the run costs, less the routers; only *which* expert a token meets differs.
    """
    model = copy.deepcopy(run.model)
    for index, layer in moe_layers(model).items():
        dim = layer.fc1.in_features
        router = RandomRouter(layer.shares, dim=dim, seed=1000 * seed + index)
        layer.router = router.to(layer.shares.device)
    return model


def statically_pruned(
    run: Extraction, images: ImageSet, *, store: str | Path | None = None
) -> Extraction:
    """Prune the same layers to the same MACs by the same rule, with one expert for all tokens.

    ``images`` are the run's own calibration images.
    """
    converted = tuple(layer.index for layer in run.layers if layer.converted)
    config = replace(run.config, experts="one", layers=converted)
    return extract(run.dense(), images, config, store=store)
