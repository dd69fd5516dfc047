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

import copy
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from timm.layers import Attention
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.experts.obs import RIDGE, elimination_costs
from moee_analysis.extraction.record.accumulate import Arrays, average, stored_arrays
from moee_analysis.extraction.record.fisher import probe
from moee_analysis.models.attention import Factors, find_attentions, heads_of
from moee_analysis.models.capture import evaluating
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.moe.layer import replace_module
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key

Place = tuple[str, int]  # name of an attention; 0: its scores, 1: its values

BATCH = 16
CENTRE_IMAGES = 200
PROBES = 1
DAMPING = 1e-2


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
        """Maps of the modes ``kept``, bool (heads, modes), as many in every head; gains refit."""
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

    def arrays(self) -> dict[str, np.ndarray]:
        """All values by name, as the store keeps them."""
        named = {"mean": self.mean}
        for kind in ("scores", "values"):
            named |= {f"{kind}_{name}": v for name, v in vars(getattr(self, kind)).items()}
        return {name: values.numpy() for name, values in named.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """Rebuild modes from their :meth:`arrays`."""
        values = {name: torch.from_numpy(array) for name, array in arrays.items()}
        names = ("left", "right", "strength", "gram")
        scores, of_values = (
            Modes(*(values[f"{kind}_{name}"] for name in names)) for kind in ("scores", "values")
        )
        return cls(scores, of_values, values["mean"])


def attention_modes(
    model: nn.Module,
    images: ImageSet,
    queries: Mapping[str, int | None],
    *,
    seed: int,
    root: Path,
) -> dict[str, AttentionModes]:
    """Measure the modes of all plain attentions of ``model``, or find them in the store.

    ``queries`` are, by the name of an attention, the leading tokens whose outputs are read (None:
    all); ``seed`` is that of the probes.
    """
    facts = {"model": fingerprint(model), "images": images.fingerprint, "seed": seed}
    facts |= {"queries": dict(queries)}
    names = [site.name for site in find_attentions(model)]
    folders = {name: f"attention-{content_key(attention=name, **facts)}" for name in names}

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        if missing:
            found = _measure(model, images, {n: queries[n] for n in names}, seed=seed)
            yield from ((name, found[name].arrays()) for name in missing)

    return {
        name: AttentionModes.from_arrays({array: np.load(path) for array, path in files.items()})
        for name, files in stored_arrays(root, folders, compute).items()
    }


class _ProbedAttention(nn.Module):
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

    def zeros(self) -> torch.Tensor:
        """Float64 (heads, head_dim, head_dim)."""
        heads, dim = self.attention.num_heads, self.attention.head_dim
        return torch.zeros(heads, dim, dim, dtype=torch.float64)


def _measure(
    dense: nn.Module, images: ImageSet, queries: Mapping[str, int | None], *, seed: int
) -> dict[str, AttentionModes]:
    """Modes in one pass over the images, their costs in another."""
    model = copy.deepcopy(dense)
    probed = {name: _ProbedAttention(model.get_submodule(name), q) for name, q in queries.items()}
    for name, module in probed.items():
        replace_module(model, name, module)
    zeros = {(n, identity): m.zeros() for n, m in probed.items() for identity in (0, 1)}
    source = _Gradients(model, probed, images, seed)
    with evaluating(model):
        _centre(model, probed, images.limit(CENTRE_IMAGES, seed=seed))
        sides = average(
            source.batches,
            lambda own: map(_sides, source.of(own, label="attention modes")),
            {(*place, side): zero.clone() for place, zero in zeros.items() for side in "LR"},
        )
        bases = {place: _basis(sides[*place, "L"], sides[*place, "R"]) for place in zeros}
        grams = average(
            source.batches,
            lambda own: (_grams(bases, T) for T in source.of(own, label="attention costs")),
            zeros,
        )
    modes = {place: Modes(*bases[place], grams[place]) for place in bases}
    return {
        name: AttentionModes(modes[name, 0], modes[name, 1], module.mean[:, 0].double().cpu())
        for name, module in probed.items()
    }


def _centre(model: nn.Module, probed: Mapping[str, _ProbedAttention], images: ImageSet) -> None:
    """Give every attention the mean of what its heads gather for the tokens that are read."""
    sums = dict.fromkeys(probed, 0.0)
    batches = images.batches(model, batch_size=BATCH)
    for batch in progress(batches, label="attention means", total=-(-len(images) // BATCH)):
        model(like(batch, model))
        for name, module in probed.items():
            sums[name] += module.gathered.double().mean(dim=2).sum(dim=0)
    for name, module in probed.items():
        module.mean = (sums[name] / len(images)).to(module.mean)[:, None]


@dataclass(frozen=True)
class _Gradients:
    """Gradients of probed logits at the identities of a ``model``, whose probes have a ``seed``."""

    model: nn.Module
    probed: Mapping[str, _ProbedAttention]
    images: ImageSet
    seed: int

    @property
    def batches(self) -> int:
        return -(-len(self.images) // BATCH)

    def of(self, own: range, *, label: str) -> Iterator[dict[Place, torch.Tensor]]:
        """T of every identity, (images, heads, head_dim, head_dim), by batch and probe."""
        first = own.start * BATCH
        images = self.images.take(range(first, min(own.stop * BATCH, len(self.images))))
        batches = images.batches(self.model, batch_size=BATCH)
        for batch in progress(batches, label=label, total=len(own)):
            with torch.enable_grad():
                logits = self.model(like(batch, self.model)).reshape(len(batch), -1)
            seen = {(n, i): t for n, m in self.probed.items() for i, t in enumerate(m.identities)}
            for number in range(PROBES):
                v = probe(logits, [(self.seed, first + row, number) for row in range(len(batch))])
                found = torch.autograd.grad(
                    logits, list(seen.values()), v, retain_graph=number < PROBES - 1
                )
                yield {place: T.double().cpu() for place, T in zip(seen, found, strict=True)}
            first += len(batch)


def _sides(gradients: Mapping[Place, torch.Tensor]) -> tuple[int, dict[tuple, torch.Tensor]]:
    """Number of gradients, and sums of T T^T and of T^T T, (heads, head_dim, head_dim)."""
    sums = {(*place, "L"): (T @ T.mT).sum(dim=0) for place, T in gradients.items()}
    sums |= {(*place, "R"): (T.mT @ T).sum(dim=0) for place, T in gradients.items()}
    return len(next(iter(gradients.values()))), sums


def _grams(
    bases: Mapping[Place, tuple[torch.Tensor, ...]], gradients: Mapping[Place, torch.Tensor]
) -> tuple[int, dict[Place, torch.Tensor]]:
    """Number of gradients, and sums of t t^T / 2, (heads, modes, modes)."""
    sums = {}
    for place, T in gradients.items():
        left, right, strength = bases[place]
        t = torch.einsum("nhab,ham,hbm->nhm", T, left, right) * strength
        sums[place] = torch.einsum("nhm,nhk->hmk", t, t) / 2
    return len(next(iter(gradients.values()))), sums


def _basis(L: torch.Tensor, R: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
