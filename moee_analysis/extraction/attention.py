"""Attention as an optional stage: which directions inside a head the prediction depends on.

Put identities between queries and keys, q I k^T, and between what a head has gathered and the
output projection, I u. A head of fewer dimensions has maps of lower rank in their place, and what
it costs follows from gradients at the identities: with T the gradient of <logits, v> (``probe``), a
change D of one identity costs about E[<T, D>^2] / 2 nats of KL divergence.

With L = E[T T^T] and R = E[T^T T], the modes of an identity are the singular vectors of L^1/4
R^1/4, the metric of Shampoo (Gupta et al., arXiv:1802.09568), mapped back: I = sum_m s_m x_m y_m^T,
and in that metric dropping the last modes is the best approximation of a rank. What a mode
contributes to the loss of an image, t_m = s_m x_m^T T y_m, plays the part of a hidden neuron's
activation in ``elimination_costs``, whose readout is ones. Modes are candidates for the one budget,
as neurons are.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from math import gcd
from pathlib import Path

import numpy as np
import torch
from timm.layers import Attention
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.experts.neuron_scores import RIDGE, elimination_costs
from moee_analysis.extraction.lagrangian import Candidates
from moee_analysis.extraction.record.accumulate import Arrays, average, stored_arrays
from moee_analysis.extraction.record.fisher import probe, unread_patches
from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.models import attention as attentions
from moee_analysis.models.attention import Factors, Reduction
from moee_analysis.models.capture import evaluating
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.inputs import like
from moee_analysis.models.macs import MacCount
from moee_analysis.moe.layer import replace_module
from moee_analysis.utils.distributed import own_share
from moee_analysis.utils.progress import progress

Place = tuple[str, str]  # name of an attention, and one of the KINDS
KeptModes = tuple[np.ndarray, np.ndarray]  # scores and values, bool (heads, head_dim)

KINDS = ("scores", "values")
FIELDS = ("left", "right", "strength", "gram")  # of Modes
BATCH, CENTRE_IMAGES, PROBES, DAMPING = 16, 200, 1, 1e-2
STEP = 8  # modes of a head: kernels are no faster for ranks between its multiples


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

    @cached_property
    def costs(self) -> np.ndarray:
        """What removing each mode costs once all cheaper ones are gone, (heads, modes)."""
        ones = torch.ones(1, self.gram.shape[-1], dtype=torch.float64)
        return torch.stack([elimination_costs(of_head, ones) for of_head in self.gram]).numpy()

    def factors(self, kept: np.ndarray) -> Factors:
        """Maps of the modes ``kept``, bool (heads, modes), as many in every head; gains refit."""
        maps = []
        for head, own in enumerate(torch.from_numpy(kept)):
            if own.all():
                maps.append(2 * [torch.eye(len(own), dtype=torch.float64)])
                continue
            strength = self.strength[head, own] * gains(self.gram[head], own)
            half = strength.abs().sqrt()
            left, right = self.left[head][:, own], self.right[head][:, own]
            maps.append([left * half * strength.sign(), right * half])
        return Factors(*map(torch.stack, zip(*maps, strict=True)))


def gains(gram: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Gains of the modes that are ``kept``, bool (modes,), that make the others' loss good."""
    ridged = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    across = gram[kept][:, ~kept].sum(dim=1)
    return 1 + torch.linalg.lstsq(ridged[kept][:, kept], across[:, None]).solution[:, 0]


@dataclass(frozen=True)
class AttentionModes:
    """Modes of one attention, and the ``mean`` (heads, head_dim) of the values it passes on."""

    scores: Modes
    values: Modes
    mean: torch.Tensor


def attention_modes(
    model: nn.Module, images: ImageSet, queries: Mapping[str, int | None], *, seed: int, root: Path
) -> dict[str, AttentionModes]:
    """Measure the modes of all plain attentions of ``model``, or find them in the store.

    ``queries`` by name are those of an :class:`AttentionPlan`; ``seed`` is that of the probes.
    """
    facts = {"model": fingerprint(model), "images": images.fingerprint, "seed": seed}
    facts |= {"queries": dict(queries)}
    names = [site.name for site in attentions.find_attentions(model)]
    by_site = {name: {"attention": name, **facts} for name in names}

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        found = _measure(model, images, {name: queries[name] for name in names}, seed=seed)
        return ((name, found[name]) for name in missing)

    found = {}
    for name, arrays in stored_arrays(root, "attention", by_site, compute).items():
        tensors = {array: torch.from_numpy(values) for array, values in arrays.items()}
        scores, values = (Modes(*(tensors[f"{kind}_{f}"] for f in FIELDS)) for kind in KINDS)
        found[name] = AttentionModes(scores, values, tensors["mean"])
    return found


class _ProbedAttention(nn.Module):
    """A dense attention with two identities in every head, of each image its own."""

    def __init__(self, attention: Attention, queries: int | None) -> None:
        super().__init__()
        self.qkv, self.proj, self.queries = attention.qkv, attention.proj, queries
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.scale = attention.scale
        self.mean = attention.qkv.weight.new_zeros(self.num_heads, 1, self.head_dim)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **_: object
    ) -> torch.Tensor:
        q, k, v = attentions.heads_of(self, x)
        one = torch.eye(self.head_dim).to(x).expand(*q.shape[:2], -1, -1)
        self.identities = {kind: one.clone().requires_grad_() for kind in KINDS}
        scores, values = self.identities.values()
        asked = q @ scores @ k.mT
        gathered = (asked if attn_mask is None else asked + attn_mask).softmax(dim=-1) @ v
        self.gathered = gathered.detach()[:, :, : self.queries]
        moved = self.mean + (gathered - self.mean) @ values.mT
        return self.proj(moved.transpose(1, 2).flatten(2))


def _measure(
    dense: nn.Module, images: ImageSet, queries: Mapping[str, int | None], *, seed: int
) -> dict[str, Arrays]:
    """Modes in one pass over the images, their costs in another; as :func:`attention_modes`."""
    model, none = copy.deepcopy(dense), {}
    probed = {name: _ProbedAttention(model.get_submodule(name), q) for name, q in queries.items()}
    for name, module in probed.items():
        replace_module(model, name, module)
        heads, dim = module.num_heads, module.head_dim
        for kind in KINDS:
            none[name, kind] = torch.zeros(0, heads, dim, dim, dtype=torch.float64)
    gradients = partial(_gradients, model, probed, images, seed)

    def sides(_: Place, T: torch.Tensor) -> torch.Tensor:
        return torch.stack([(T @ T.mT).sum(dim=0), (T.mT @ T).sum(dim=0)])

    def gram(place: Place, T: torch.Tensor) -> torch.Tensor:
        left, right, strength = bases[place]
        t = torch.einsum("nhab,ham,hbm->nhm", T, left, right) * strength
        return torch.einsum("nhm,nhk->hmk", t, t) / 2

    with evaluating(model):
        _centre(model, probed, images.limit(CENTRE_IMAGES, seed=seed))
        both = average(gradients("attention modes"), sides, none)
        bases = {place: _basis(L, R) for place, (L, R) in both.items()}
        grams = average(gradients("attention costs"), gram, none)
    found = {name: {"mean": m.mean[:, 0].double().cpu().numpy()} for name, m in probed.items()}
    for (name, kind), basis in bases.items():
        of_kind = zip(FIELDS, (*basis, grams[name, kind]), strict=True)
        found[name] |= {f"{kind}_{field}": values.numpy() for field, values in of_kind}
    return found


def _centre(model: nn.Module, probed: dict[str, _ProbedAttention], images: ImageSet) -> None:
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
    model: nn.Module, probed: dict[str, _ProbedAttention], images: ImageSet, seed: int, label: str
) -> Iterator[dict[Place, torch.Tensor]]:
    """Gradients T at every identity (images, heads, head_dim, head_dim), by own batch and probe."""
    own = own_share(-(-len(images) // BATCH))
    first = own.start * BATCH
    images = images.take(range(len(images))[first : own.stop * BATCH])
    batches = images.batches(model, batch_size=BATCH)
    for batch in progress(batches, label=label, total=len(own)):
        with torch.enable_grad():
            logits = model(like(batch, model)).reshape(len(batch), -1)
        seen = {(n, kind): t for n, m in probed.items() for kind, t in m.identities.items()}
        for number in range(PROBES):
            v = probe(logits, [(seed, first + row, number) for row in range(len(batch))])
            more = number < PROBES - 1
            found = torch.autograd.grad(logits, list(seen.values()), v, retain_graph=more)
            yield {place: T.double().cpu() for place, T in zip(seen, found, strict=True)}
        first += len(batch)


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


@dataclass(frozen=True)
class AttentionPlan:
    """An attention before the ranks of its heads are chosen.

    Of its ``tokens`` only the outputs of the first ``queries`` are read; None: of all. ``modes`` is
    None where the heads keep all dimensions; ``bias`` says whether its queries have one.
    """

    site: attentions.AttentionSite
    tokens: int
    queries: int | None
    bias: bool
    modes: AttentionModes | None = None

    def macs(self, kept: KeptModes | None) -> int:
        """MACs of one image with the ``kept`` scores and values; None: with all."""
        whole = 2 * self.site.heads * self.site.head_dim
        return self._macs * (whole if kept is None else sum(int(each.sum()) for each in kept))

    @property
    def fixed_parameters(self) -> int:
        """Parameters that no choice of modes changes: the output's bias, or all."""
        dimensions = 0 if self.modes else self.site.heads * self.site.head_dim
        return self.site.dim + dimensions * (4 * self.site.dim + self.bias)

    def candidates(self) -> list[Candidates]:
        """Blocks, each the next few best modes of every head, of the scores and of the values."""
        found, size, dim = [], self._step * self.site.heads, self.site.dim
        for modes, bias in ((self.modes.scores, self.bias), (self.modes.values, 0)):
            best_first = -np.sort(-modes.costs, axis=1)
            costs = best_first.sum(axis=0).reshape(1, -1, self._step).sum(axis=2)
            macs, parameters = size * self._macs, size * (2 * dim + bias)
            found.append(Candidates(costs, np.ones(1), macs, parameters))
        return found

    def in_heads(self, scores: np.ndarray, values: np.ndarray) -> KeptModes:
        """Modes of so many blocks, bool (1, blocks); no scores where values are gone."""

        def best(modes: Modes, blocks: int) -> np.ndarray:
            place = np.argsort(np.argsort(-modes.costs, axis=1, kind="stable"), axis=1)
            return place < blocks * self._step

        asked = int(scores.sum()) if values.any() else 0
        return best(self.modes.scores, asked), best(self.modes.values, int(values.sum()))

    @property
    def _macs(self) -> int:
        """MACs of one image for a dimension of a head's scores, or for one of its values."""
        asked = self.queries or self.tokens
        return self.site.dim * (asked + self.tokens) + asked * self.tokens

    @property
    def _step(self) -> int:
        """Modes that a head gets at a time."""
        return gcd(STEP, self.site.head_dim)


def plan_attentions(
    model: nn.Module, images: ImageSet, config: ExtractConfig, *, dense: MacCount, root: Path
) -> list[AttentionPlan]:
    """Plan the attentions of ``config``: none, those with unread outputs, or all."""
    find = {"low_rank": attentions.find_attentions, "read": attentions.plain_attentions}
    sites = find[config.attention](model) if config.attention in find else []
    if not sites:
        return []
    unread = unread_patches(model, sites)
    leading = leading_kinds(model, [site.name for site in sites])
    queries = {n: len(kinds) or None if n in unread else None for n, kinds in leading.items()}
    modes = {}
    if config.attention == "low_rank":
        modes = attention_modes(model, images, queries, seed=config.seed, root=root)
    return [
        AttentionPlan(
            site, dense.tokens[site.name], queries[site.name],
            bias=site.module(model).qkv.bias is not None, modes=modes.get(site.name),
        )
        for site in sites
        if site.name in unread or site.name in modes
    ]  # fmt: skip


def reduce_attention(
    model: nn.Module, plans: Sequence[AttentionPlan], kept: Mapping[str, KeptModes]
) -> None:
    """Put the planned attentions of the ``kept`` modes in the place of the model's own."""
    for plan in plans:
        site, modes, heads = plan.site, plan.modes, kept.get(plan.site.name)
        scores = values = Factors.whole(site)
        mean = torch.zeros(site.heads, site.head_dim)
        if heads is not None:
            scores, values = modes.scores.factors(heads[0]), modes.values.factors(heads[1])
            mean = modes.mean
        reduction = Reduction(scores, values, mean, plan.queries)
        replace_module(model, site.name, attentions.low_rank(site, site.module(model), reduction))
