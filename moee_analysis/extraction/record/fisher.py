"""How far a change of an MLP's output moves the prediction: gradients, and the metric of errors.

For gradients g of :func:`output_gradients`, Q = E[g g^T] over an expert's tokens is the Fisher
information of its output: an error e of one token costs about e^T Q e / 2 nats of KL divergence.
This takes the errors of the tokens of an image as independent, as the Kronecker-factored
approximation for shared weights does ("expand", Eschenhagen et al., arXiv:2311.00636).
"""

from collections.abc import Mapping, Sequence
from itertools import zip_longest

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.tokens import LayerSample, leading_kinds
from moee_analysis.models.attention import AttentionSite
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite, find_mlps, input_size

Sites = Sequence[MlpSite | AttentionSite]

PRIOR = 500  # tokens' worth of the metric of all experts that each expert's own is mixed with
CHUNK = 16384
DAMPING = 0.2  # share of the mean eigenvalue added to all


def products(sample: LayerSample, rows: np.ndarray) -> torch.Tensor:
    """Sum of g g^T over the tokens that ``rows`` stand for, mean of probes, float64 (dim, dim)."""
    dim = sample.inputs.shape[1]
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        gradients = torch.from_numpy(sample.gradients(part))
        weighted = gradients * torch.from_numpy(sample.mass(part))[:, None]
        total += weighted.flatten(end_dim=1).T @ gradients.flatten(end_dim=1) / len(gradients)
    return total


def expert_metrics(sums: Mapping[str, torch.Tensor], kinds: np.ndarray) -> torch.Tensor:
    """Damped metric Q of every expert, float64 (experts, dim, dim): an error e costs e^T Q e nats.

    An expert's own is mixed with that of all tokens of the kind it serves, ``kinds`` (experts,), as
    if these were :data:`PRIOR` tokens more. ``sums`` are those of a ``StatisticsAccumulator``.
    """
    least = torch.finfo(sums["kinds"].dtype).tiny
    priors = sums["kinds"] / sums["of_kinds"].clamp_min(least)[:, None, None]
    mixed = (sums["fisher"] + PRIOR * priors[kinds]) / (sums["weight"] + PRIOR)[:, None, None]
    return damp(mixed) / 2


def damp(metric: torch.Tensor) -> torch.Tensor:
    """``metric`` (..., dim, dim) plus a share of its mean eigenvalue in every direction."""
    mean = metric.diagonal(dim1=-2, dim2=-1).mean(dim=-1)[..., None, None]
    return metric + DAMPING * mean * torch.eye(metric.shape[-1], dtype=metric.dtype)


def root(metric: torch.Tensor) -> torch.Tensor:
    """Symmetric square root of a positive semidefinite matrix, float64."""
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def input_root(mlp: Mlp, metric: torch.Tensor) -> torch.Tensor:
    """Linear map A (dim, dim) after which distances of inputs are about those of outputs.

    A^T A = W1^T diag(s) W1 with s_j = W2_j^T Q W2_j: the change of output that a change of input
    makes, in the metric Q, if hidden neurons pass on all of it and independently of each other.
    """
    W1, W2 = mlp.fc1.weight.detach().double().cpu(), mlp.fc2.weight.detach().double().cpu()
    return root(W1.T @ (importance(W2, metric)[:, None] * W1))


def importance(readout: torch.Tensor, metric: torch.Tensor) -> torch.Tensor:
    """Squared length of each neuron's output weights in a metric, W2_j^T Q W2_j: (hidden,)."""
    return ((metric @ readout) * readout).sum(dim=0)


def probe(logits: torch.Tensor, seeds: Sequence[Sequence[int]]) -> torch.Tensor:
    """Draw one random direction v, (images, classes), of the logits of each image.

    v = sqrt(p) xi - p <sqrt(p), xi> with p = softmax(logits) and xi ~ N(0, I), decided by the
    ``seeds`` of the image alone. Its covariance is diag(p) - p p^T, the Fisher information of the
    classes in the logits (Martens, arXiv:1412.1193): the KL divergence of a small change of the
    logits is half its quadratic form. No labels are needed, and no gradient flows back.
    """
    each = zip(map(np.random.default_rng, seeds), logits, strict=True)
    draws = [rng.standard_normal(len(of_image)) for rng, of_image in each]
    xi = torch.from_numpy(np.stack(draws)).to(logits)
    if logits.shape[1] == 1:  # no classes: a small change counts by its square
        return xi
    p = torch.softmax(logits.detach(), dim=-1)
    scaled = p.sqrt() * xi
    return scaled - p * scaled.sum(dim=-1, keepdim=True)


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
    ``x`` are images; the ``seeds`` of each and the number of the probe alone decide its draws.

    Returned by name of site, (probes, images, tokens, dim) float32; grids are flattened row by row,
    windows one after the other. All zeros where the logits do not depend on an output.
    """
    calls: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}

    def keep(name: str, output: torch.Tensor) -> None:
        # The weights ask for no gradients, so the graph begins at the first site.
        calls[name].append(output if output.requires_grad else output.requires_grad_())

    modules = {site.name: site.module(model) for site in sites}
    with evaluating(model), torch.enable_grad(), watch(modules, keep, "outputs"):
        logits = model(x).reshape(len(x), -1)
    for name, seen in calls.items():
        if len(seen) != 1 or len(seen[0]) % len(x):  # all images, or as many windows of each
            shapes = ", ".join(str(tuple(output.shape)) for output in seen)
            expected = f"one call of '{name}' with all tokens of {len(x)} images"
            hint = "record such a model without gradients, or leave this site out"
            raise MoeeError(expected, f"{len(seen)} calls with outputs {shapes or 'of none'}", hint)
    by_probe = []
    for number in range(probes):
        v = probe(logits, [(*seed, number) for seed in seeds])
        gradients = torch.autograd.grad(
            logits, [output for (output,) in calls.values()], v, retain_graph=number < probes - 1,
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
        by_probe.append([g.reshape(len(x), -1, g.shape[-1]).float() for g in gradients])
    return dict(zip(calls, map(torch.stack, zip(*by_probe, strict=True)), strict=True))


def unread_kinds(model: nn.Module, sites: Sites | None = None) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the tokens whose outputs at each of the ``sites`` nothing reads any more.

    There the logits' gradient is exactly zero at every token of the kind, such as "patch" in the
    last block of a ViT whose head reads CLS alone, for a random image. ``sites`` None: all MLPs.
    """
    found = _read_kinds(model, sites).items()
    return {name: tuple(kind for kind in read if not read[kind]) for name, read in found}


def unread_patches(model: nn.Module, sites: Sites | None = None) -> frozenset[str]:
    """Return the names of ``sites`` that get no patches, or whose outputs there nothing reads."""
    read_kinds = _read_kinds(model, sites)
    return frozenset(name for name, read in read_kinds.items() if not read.get("patch"))


def _read_kinds(model: nn.Module, sites: Sites | None) -> dict[str, dict[str, bool]]:
    """Whether the output of any token of a kind is read, by site and kind."""
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    sites = find_mlps(model) if sites is None else sites
    gradients = output_gradients(model, sites, like(image, model), seeds=[(0, 0)], probes=1)
    leading = leading_kinds(model, gradients)
    found: dict[str, dict[str, bool]] = {name: {} for name in gradients}
    for name, gradient in gradients.items():
        read = gradient.flatten(0, 1).any(dim=2).any(dim=0).tolist()
        for kind, is_read in zip_longest(leading[name], read, fillvalue="patch"):
            found[name][kind] = found[name].get(kind, False) or is_read
    return found
