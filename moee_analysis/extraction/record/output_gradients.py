"""How far a change of an MLP's output moves the prediction: gradients of random probes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import watch
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import MlpSite


def probe(logits: torch.Tensor, seeds: Sequence[Sequence[int]]) -> torch.Tensor:
    """Draw one random direction v, (images, classes), of the logits of each image.

    v = sqrt(p) xi - p <sqrt(p), xi> with p = softmax(logits) and xi ~ N(0, I), decided by the
    ``seeds`` of the image alone. Its covariance is diag(p) - p p^T, the Fisher information of the
    classes in the logits (Martens, arXiv:1412.1193): the KL divergence of a small change of the
    logits is half its quadratic form. No labels are needed, and no gradient flows back. Of a
    single output, which has no classes, v is xi itself.
    """
    if len(seeds) != len(logits):
        raise MoeeError(
            f"seeds of {len(logits)} images", f"{len(seeds)}", "give every image seeds of its own"
        )
    draws = [np.random.default_rng(seed).standard_normal(logits.shape[1]) for seed in seeds]
    xi = torch.from_numpy(np.stack(draws)).to(logits)
    if logits.shape[1] == 1:  # no classes: a small change counts by its square
        return xi
    p = torch.softmax(logits.detach(), dim=-1)
    root = p.sqrt()
    return root * xi - p * (root * xi).sum(dim=-1, keepdim=True)


def output_gradients(
    model: nn.Module,
    sites: Sequence[MlpSite],
    x: torch.Tensor,
    *,
    seeds: Sequence[Sequence[int]],
    probes: int,
) -> dict[str, torch.Tensor]:
    """Gradients g of <logits, v> at the outputs of MLPs, for ``probes`` draws of v per image.

    The mean of (sum_t g_t . delta_t)^2 / 2 over draws, t running over all tokens of an image, is
    to second order the KL divergence, in nats, that changes delta_t of one site's outputs cause.
    ``x`` are (images, channels, height, width); the ``seeds`` of an image and the number of the
    probe alone decide its draws. The model is left as it was.

    Returns
    -------
    dict
        By name of site, (probes, images, tokens, dim) float32; a grid of tokens is flattened
        row by row, windows in the place of an image one after the other. All zeros where the
        logits do not depend on an output.
    """
    calls: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}

    def keep(name: str, output: torch.Tensor) -> None:
        # The weights ask for no gradients, so the graph begins at the first site.
        calls[name].append(output if output.requires_grad else output.requires_grad_())

    modules = {site.name: site.module(model) for site in sites}
    with evaluating(model), torch.enable_grad(), watch(modules, keep, "outputs"):
        logits = model(x).reshape(len(x), -1)
    for name, seen in calls.items():
        _check_calls(name, seen, len(x))
    by_probe = []
    for number in range(probes):
        v = probe(logits, [(*seed, number) for seed in seeds])
        gradients = torch.autograd.grad(
            logits, [output for (output,) in calls.values()], v, retain_graph=number < probes - 1,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        by_probe.append([g.reshape(len(x), -1, g.shape[-1]).float() for g in gradients])
    return dict(zip(calls, map(torch.stack, zip(*by_probe, strict=True)), strict=True))


def _check_calls(name: str, seen: list[torch.Tensor], images: int) -> None:
    """Refuse a site without exactly one call, of images or as many windows of each."""
    if len(seen) != 1 or len(seen[0]) % images:
        shapes = ", ".join(str(tuple(output.shape)) for output in seen)
        raise MoeeError(
            f"one call of '{name}' with all tokens of {images} images",
            f"{len(seen)} calls with outputs {shapes or 'of none'}",
            "record such a model without gradients, or leave this site out",
        )
