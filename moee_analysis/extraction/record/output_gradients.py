"""How far a change of an MLP's output moves the prediction: gradients of random probes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.loading import MlpSite


def probe(logits: torch.Tensor, seeds: Sequence[Sequence[int]]) -> torch.Tensor:
    """Draw one random direction v of the logits of each image.

    v = sqrt(p) xi - p <sqrt(p), xi> with p = softmax(logits) and xi ~ N(0, I). Its covariance
    is diag(p) - p p^T, the Fisher information of the classes in the logits (Martens,
    arXiv:1412.1193): the KL divergence of a small change of the logits is half its quadratic
    form. No labels are needed. Of a single output, which has no classes, v is xi itself.

    Parameters
    ----------
    logits
        (images, classes); no gradient flows back to them.
    seeds
        Integers of each image; they alone decide its xi.

    Returns
    -------
    torch.Tensor
        v (images, classes), of the type and on the device of ``logits``.

    Raises
    ------
    MoeeError
        Another number of seeds than of images.
    """
    if len(seeds) != len(logits):
        raise MoeeError(
            f"seeds of {len(logits)} images", f"{len(seeds)}", "give every image seeds of its own"
        )
    drawn = [np.random.default_rng(seed).standard_normal(logits.shape[1]) for seed in seeds]
    xi = torch.from_numpy(np.stack(drawn)).to(logits)
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
    The model is left as it was: same flags, no hooks, no gradients on its weights.

    Parameters
    ----------
    x
        (images, channels, height, width).
    seeds
        Integers of each image; with the number of the probe they alone decide its draws,
        whatever batch it is in.

    Returns
    -------
    dict
        By name of site, (probes, images, tokens, dim) float32; a grid of tokens is flattened
        row by row, windows in the place of an image one after the other. All zeros where the
        logits do not depend on an output.

    Raises
    ------
    MoeeError
        A site that is not called exactly once, or that gets no whole number of windows per image.
    """
    with evaluating(model), torch.enable_grad(), _outputs(model, sites) as calls:
        logits = model(x).reshape(len(x), -1)
    outputs = {name: _only(name, seen, len(x)) for name, seen in calls.items()}
    found: dict[str, list[torch.Tensor]] = {name: [] for name in outputs}
    for number in range(probes):
        v = probe(logits, [(*seed, number) for seed in seeds])
        gradients = torch.autograd.grad(
            logits, list(outputs.values()), v, retain_graph=number < probes - 1,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        for name, gradient in zip(found, gradients, strict=True):
            found[name].append(gradient.reshape(len(x), -1, gradient.shape[-1]).float())
    return {name: torch.stack(of_probes) for name, of_probes in found.items()}


def taken_apart(gradients: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split gradients (..., dim) into unit vectors (..., dim) and norms (...,), both float32.

    The unit vectors are safe in half precision whatever the gradients' size; zeros stay zeros.
    """
    exact = gradients.double()  # where no square of a float32 over- or underflows
    norms = torch.linalg.vector_norm(exact, dim=-1)
    directions = exact / norms.clamp_min(torch.finfo(norms.dtype).tiny)[..., None]
    return directions.float(), norms.float()


@contextmanager
def _outputs(model: nn.Module, sites: Sequence[MlpSite]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """While open, every call of a site leaves its output, from where a graph is kept."""
    calls: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    with ExitStack() as hooks:
        for site in sites:
            keep = partial(_keep, calls[site.name])
            hooks.callback(site.module(model).register_forward_hook(keep).remove)
        yield calls


def _keep(
    seen: list[torch.Tensor], _module: nn.Module, _args: tuple[torch.Tensor], output: torch.Tensor
) -> None:
    # The weights ask for no gradients, so the graph begins here at the first site.
    seen.append(output if output.requires_grad else output.requires_grad_())


def _only(name: str, seen: list[torch.Tensor], images: int) -> torch.Tensor:
    """Return the output of a site's only call, of images or as many windows of each."""
    if len(seen) != 1 or len(seen[0]) % images:
        shapes = ", ".join(str(tuple(output.shape)) for output in seen)
        raise MoeeError(
            f"one call of '{name}' with all tokens of {images} images",
            f"{len(seen)} calls with outputs {shapes or 'of none'}",
            "record such a model without gradients, or leave this site out",
        )
    return seen[0]
