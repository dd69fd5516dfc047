"""Which directions inside an attention head the prediction depends on.

Put identities between queries and keys, q I k^T, and between what a head has gathered and the
output projection, I u. A head of fewer dimensions is one with maps M of lower rank in their
place, and what it costs follows from gradients at the identities: with T the gradient of
<logits, v> (``probe``), a change D of one identity costs about
E[<T, D>^2] / 2 nats of KL divergence. T sums over all tokens of an image, so errors that agree
count as they add up.

With L = E[T T^T] and R = E[T^T T], the modes of an identity are the singular vectors of L^1/4
R^1/4, the metric of Shampoo (Gupta et al., arXiv:1802.09568), mapped back: I = sum_m s_m x_m y_m^T,
and in that metric dropping the last modes is the best approximation of a rank. What a mode
contributes to the loss of an image, t_m = s_m x_m^T T y_m, then plays the part of a hidden neuron's
activation in the elimination of ``obs``, whose readout is ones: modes go
whose loss refitted gains of the others can best make good.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Attention
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.experts.obs import RIDGE, elimination_costs
from moee_analysis.extraction.record.output_gradients import probe
from moee_analysis.models.attention import AttentionSite, Factors, find_attentions, heads_of
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import fingerprint
from moee_analysis.moe.layer import replace_module
from moee_analysis.utils.distributed import agreed, all_sum, own_share
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key, kept, present

Place = tuple[str, int]  # name of an attention; 0: its scores, 1: its values
Basis = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

BATCH = 16
CENTRE_IMAGES = 200
PROBES = 1
DAMPING = 1e-2
FILE = "modes.safetensors"


@dataclass(frozen=True)
class Modes:
    """Modes of the identities of one attention, all float64.

    The identity of a head is left diag(strength) right^T; ``left`` and ``right`` are (heads,
    head_dim, modes), ``strength`` (heads, modes). ``gram`` (heads, modes, modes) is E[t t^T] / 2:
    gains c in the place of ones cost (c - 1)^T gram (c - 1) nats per image.
    """

    left: torch.Tensor
    right: torch.Tensor
    strength: torch.Tensor
    gram: torch.Tensor

    def costs(self) -> np.ndarray:
        """What removing each mode costs once all cheaper ones are gone, (heads, modes)."""
        ones = torch.ones(1, self.gram.shape[-1], dtype=torch.float64)
        return torch.stack([elimination_costs(of_head, ones) for of_head in self.gram]).numpy()

    def factors(self, kept: np.ndarray) -> Factors:
        """Maps of the modes that are ``kept``, bool (heads, modes), their gains refitted.

        Every head keeps as many.
        """
        left, right = zip(*map(self._head, range(len(kept)), torch.from_numpy(kept)), strict=True)
        return Factors(torch.stack(left), torch.stack(right))

    def _head(self, head: int, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if kept.all():
            whole = torch.eye(len(kept), dtype=torch.float64)
            return whole, whole
        strength = self.strength[head, kept] * gains(self.gram[head], kept)
        half = strength.abs().sqrt()
        return self.left[head][:, kept] * half * strength.sign(), self.right[head][:, kept] * half


def gains(gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gains of the modes that are ``kept``, bool (modes,), that make the others' loss good."""
    ridged = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    across = gram[kept][:, ~kept].sum(dim=1)
    return 1 + torch.linalg.lstsq(ridged[kept][:, kept], across[:, None]).solution[:, 0]


@dataclass(frozen=True)
class AttentionModes:
    """Modes of one attention: of its ``scores``, and of the ``values`` that its heads pass on.

    ``mean`` (heads, head_dim) is that of these values, over the tokens that are read.
    """

    scores: Modes
    values: Modes
    mean: torch.Tensor


def attention_modes(
    model: nn.Module,
    images: ImageSet,
    queries: Mapping[str, int | None],
    *,
    seed: int,
    root: Path,
) -> dict[str, AttentionModes]:
    """Measure the modes of all plain attentions of ``model``, or find them in the store.

    Parameters
    ----------
    queries
        By the name of an attention, the leading tokens whose outputs are read; None: all.
    seed
        Of the probes.

    Raises
    ------
    MoeeError
        No plain attention.
    """
    sites = find_attentions(model)
    facts = {"model": fingerprint(model), "images": images.fingerprint, "seed": seed}
    folder = root / f"attention-{content_key(attention_modes=dict(queries), **facts)}"
    if not agreed(present(folder)):
        found = _flat(_measured(model, images, sites, queries, seed))
        kept(root, folder.name, lambda new: save_file(found, new / FILE))
    tensors = load_file(folder / FILE)
    return {site.name: _of_site(site.name, tensors) for site in sites}


class _Probed(nn.Module):
    """A dense attention with two identities in every head, of each image its own."""

    def __init__(self, attention: Attention, queries: int | None) -> None:
        super().__init__()
        self.attention, self.queries = attention, queries
        self.mean = attention.qkv.weight.new_zeros(attention.num_heads, 1, attention.head_dim)
        self.identities: tuple[torch.Tensor, torch.Tensor] | None = None
        self.gathered: torch.Tensor | None = None

    def forward(self, x: torch.Tensor, **_: object) -> torch.Tensor:
        q, k, v = heads_of(self.attention, x)
        one = torch.eye(self.attention.head_dim).to(x).expand(*q.shape[:2], -1, -1)
        self.identities = one.clone().requires_grad_(), one.clone().requires_grad_()
        scores, values = self.identities
        gathered = (q @ scores @ k.mT).softmax(dim=-1) @ v
        self.gathered = gathered.detach()[:, :, : self.queries]
        moved = self.mean + (gathered - self.mean) @ values.mT
        return self.attention.proj(moved.transpose(1, 2).flatten(2))


def _measured(
    model: nn.Module,
    images: ImageSet,
    sites: list[AttentionSite],
    queries: Mapping[str, int | None],
    seed: int,
) -> dict[str, AttentionModes]:
    """Modes in one pass over the images, what they cost in another."""
    model = copy.deepcopy(model)
    probed = {site.name: _Probed(site.module(model), queries[site.name]) for site in sites}
    for name, module in probed.items():
        replace_module(model, name, module)
    with evaluating(model):
        _centre(model, probed, images.limit(CENTRE_IMAGES, seed=seed))
        gradients = _gradients(model, probed, images, seed=seed, label="attention modes")
        sides = _means(_sides, gradients, _zeros(sites, 2))
        bases = {place: _basis(*both) for place, both in sides.items()}
        gradients = _gradients(model, probed, images, seed=seed, label="attention costs")
        grams = _means(lambda place, T: _gram(bases[place], T), gradients, _zeros(sites, 1))
    modes = {place: Modes(*basis, *grams[place]) for place, basis in bases.items()}
    return {
        name: AttentionModes(modes[name, 0], modes[name, 1], module.mean[:, 0].double().cpu())
        for name, module in probed.items()
    }


def _centre(model: nn.Module, probed: Mapping[str, _Probed], images: ImageSet) -> None:
    """Give every attention the mean of what its heads gather for the tokens that are read."""
    sums = dict.fromkeys(probed, 0.0)
    batches = images.batches(model, batch_size=BATCH)
    for batch in progress(batches, label="attention means", total=-(-len(images) // BATCH)):
        model(like(batch, model))
        for name, module in probed.items():
            sums[name] += module.gathered.double().mean(dim=2).sum(dim=0)
    for name, module in probed.items():
        module.mean = (sums[name] / len(images)).to(module.mean)[:, None]


def _gradients(
    model: nn.Module, probed: Mapping[str, _Probed], images: ImageSet, *, seed: int, label: str
) -> Iterator[dict[Place, torch.Tensor]]:
    """T of every identity, (images * probes, heads, head_dim, head_dim), batch by batch.

    Of several processes each has whole batches of its own.
    """
    own = own_share(-(-len(images) // BATCH))
    first = own.start * BATCH
    mine = images.take(range(first, min(own.stop * BATCH, len(images))))
    batches = mine.batches(model, batch_size=BATCH)
    for batch in progress(batches, label=label, total=len(own)):
        with torch.enable_grad():
            logits = model(like(batch, model)).reshape(len(batch), -1)
        places = {(name, i): t for name, m in probed.items() for i, t in enumerate(m.identities)}
        for number in range(PROBES):
            v = probe(logits, [(seed, first + row, number) for row in range(len(batch))])
            found = torch.autograd.grad(
                logits, list(places.values()), v, retain_graph=number < PROBES - 1
            )
            yield {place: T.double().cpu() for place, T in zip(places, found, strict=True)}
        first += len(batch)


def _means(
    products: Callable[[Place, torch.Tensor], tuple[torch.Tensor, ...]],
    gradients: Iterator[dict[Place, torch.Tensor]],
    totals: Mapping[Place, tuple[torch.Tensor, ...]],
) -> dict[Place, tuple[torch.Tensor, ...]]:
    """Means over all gradients, of all processes, of what ``products`` sums over some of them.

    ``totals`` are zeros of the shapes of these sums, by place.
    """
    count = torch.zeros((), dtype=torch.float64)
    for found in gradients:
        for place, T in found.items():
            for total, summed in zip(totals[place], products(place, T), strict=True):
                total.add_(summed)
        count += len(T)
    all_sum(count)
    return {place: tuple(all_sum(t) / count for t in sums) for place, sums in totals.items()}


def _zeros(sites: Sequence[AttentionSite], sums: int) -> dict[Place, tuple[torch.Tensor, ...]]:
    """So many zeros (heads, head_dim, head_dim) for the scores and the values of every site."""
    return {
        (site.name, place): tuple(
            torch.zeros(site.heads, site.head_dim, site.head_dim, dtype=torch.float64)
            for _ in range(sums)
        )
        for site in sites
        for place in (0, 1)
    }


def _sides(_: Place, T: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of T T^T and of T^T T, (heads, head_dim, head_dim)."""
    return (T @ T.mT).sum(dim=0), (T.mT @ T).sum(dim=0)


def _gram(basis: Basis, T: torch.Tensor) -> tuple[torch.Tensor]:
    """Sum of t t^T / 2, (heads, modes, modes)."""
    left, right, strength = basis
    t = torch.einsum("nhab,ham,hbm->nhm", T, left, right) * strength
    return (torch.einsum("nhm,nhk->hmk", t, t) / 2,)


def _basis(L: torch.Tensor, R: torch.Tensor) -> Basis:
    """Left and right of the modes, (heads, head_dim, modes), and strengths (heads, modes)."""
    (half_left, back_left), (half_right, back_right) = _fourth_roots(L), _fourth_roots(R)
    U, strength, Vt = torch.linalg.svd(half_left @ half_right)
    return back_left @ U, back_right @ Vt.mT, strength


def _fourth_roots(metric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Fourth roots of damped metrics (heads, dim, dim), and their inverses."""
    scale = metric.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    values, vectors = torch.linalg.eigh(metric)
    values = (values.clamp_min(0) + DAMPING * scale[:, None])[:, None] ** 0.25
    return (vectors * values) @ vectors.mT, (vectors / values) @ vectors.mT


def _flat(found: Mapping[str, AttentionModes]) -> dict[str, torch.Tensor]:
    """Tensors by dotted names, as one file holds them."""
    tensors = {f"{name}.mean": each.mean for name, each in found.items()}
    for name, each in found.items():
        for kind in ("scores", "values"):
            own = vars(getattr(each, kind))
            tensors |= {f"{name}.{kind}.{field}": t.contiguous() for field, t in own.items()}
    return tensors


def _of_site(name: str, tensors: Mapping[str, torch.Tensor]) -> AttentionModes:
    scores, values = (
        Modes(**{f.name: tensors[f"{name}.{kind}.{f.name}"] for f in fields(Modes)})
        for kind in ("scores", "values")
    )
    return AttentionModes(scores, values, tensors[f"{name}.mean"])
