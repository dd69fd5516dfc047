"""How much of the experts' score a router captures: the measure of MoEfication."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from moee_analysis.baselines.moefication.config import Score
from moee_analysis.baselines.moefication.layer_tokens import (
    BLOCK,
    in_folder,
    layer_tokens,
    recorded_inputs,
)
from moee_analysis.baselines.moefication.routers import GroundTruthRouter
from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.record.hooks import LayerSample
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import MoeMlp, moe_layers


def captured(scores: torch.Tensor, chosen: torch.Tensor) -> float:
    """Mean over tokens of the share of all ``scores`` that the ``chosen`` experts have.

    ``scores`` (n, experts) are none of them negative, ``chosen`` int64 (n, k). Tokens without any
    score count as captured.
    """
    scores = scores.double()
    all_scores, own = scores.sum(1), scores.gather(1, chosen).sum(1)
    return torch.where(all_scores > 0, own / all_scores, 1.0).mean().item()


def captured_mass(
    dense: nn.Module,
    moefied: nn.Module,
    images: ImageSet,
    *,
    score: Score | None = None,
    tokens: int = 40_000,
    seed: int = 0,
    store: str | Path | None = None,
) -> pd.DataFrame:
    """Share of the experts' score that the routers of ``moefied`` capture, by layer.

    All layers see what they see in the ``dense`` model.

    Parameters
    ----------
    score
        As in :class:`MoeficationConfig`; None: the one that each layer was made with.
    tokens
        About how many tokens of ``images`` are looked at.
    store
        Folder that keeps their recording, or has it; None keeps nothing.

    Returns
    -------
    DataFrame
        ``layer``, ``experts``, ``k``, ``score``, ``captured`` (the routers' share), ``best`` (that
        of the experts of the highest scores) and ``even`` (k / experts, that of chance).
    """
    layers = moe_layers(moefied)
    sites = [site for site in find_mlps(dense) if site.index in layers]
    with in_folder(store) as root:
        recording = recorded_inputs(dense, images, sites, tokens=tokens, seed=seed, root=root)
        rows = [
            {"layer": site.index, **_of_layer(layers[site.index], recording.layer(site), score)}
            for site in sites
        ]
    table = pd.DataFrame(rows)
    table.attrs["caption"] = f"About {tokens} tokens of {len(images)} images."
    return table


@torch.no_grad()
def _of_layer(layer: MoeMlp, sample: LayerSample, score: Score | None) -> dict[str, Any]:
    origin = layer.origin if score is None else replace(layer.origin, score=score)
    tokens = layer_tokens(sample, layer)
    chosen = torch.cat([layer.router(inputs) for inputs in tokens.inputs.split(BLOCK)])
    truth = GroundTruthRouter(layer, origin, k=chosen.shape[1]).to(chosen.device)
    scores = truth.scores(tokens.inputs)
    return {
        "experts": layer.n_experts,
        "k": truth.k,
        "score": origin.score,
        "captured": captured(scores, chosen),
        "best": captured(scores, scores.topk(truth.k, dim=1).indices),
        "even": truth.k / layer.n_experts,
    }
