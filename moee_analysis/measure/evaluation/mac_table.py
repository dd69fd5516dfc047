"""Where MACs and parameters go, next to the dense model; MACs for outputs that nothing reads."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models.beit import Attention as BeitAttention
from timm.models.eva import EvaAttention
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import unread_kinds
from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.measure.routing.inputs import Run, model_of
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.measure.routing.routes import routes as route
from moee_analysis.models.attention import LowRankAttention, reduced_attentions
from moee_analysis.models.macs import MacCount, count, count_parameters
from moee_analysis.models.merging import merge_costs, unmerged
from moee_analysis.moe.layer import MoeMlp, all_mlps, moe_names
from moee_analysis.moe.routers import TokenKindRouter

ATTENTIONS = (Attention, AttentionRope, BeitAttention, EvaAttention)
LAYERS = (Mlp, GluMlp, SwiGLU, MoeMlp, LowRankAttention, *ATTENTIONS)

NAMES = {
    "cls": "CLS token", "dist": "distillation token", "register": "registers", "patch": "patches",
}  # fmt: skip
_WHOLE = ["layer", "experts", "macs_dense", "macs_left", "params_dense", "params"]
_SUMS = [*_WHOLE[1:], "macs", "macs_unread_dense", "macs_unread"]
_FRACTIONS = ["active_fraction", "union_fraction"]


@dataclass(frozen=True)
class UnreadMacs:
    """MACs of one image for tokens whose outputs nothing reads, of ``kinds`` such as "patch".

    ``dense`` is what the layer spent before it was taken apart or cut down, and tokens merged.
    """

    kinds: tuple[str, ...]
    dense: float
    now: float


def unread_macs(
    model: nn.Module, *, shares: Mapping[str, torch.Tensor] | None = None
) -> dict[str, UnreadMacs]:
    """Return what the layers of ``model`` spend on tokens that nothing reads, by module name.

    Only MLPs and attentions (of :data:`LAYERS`) with such tokens are there. Of routed layers,
    tokens with experts of their own are told from others; where all are routed alike, each costs
    what a token does on average. ``shares`` are measured routing shares (experts,) of routed
    layers, by module name; others have those of the calibration.
    Raises MoeeError: what ``prefix_kinds`` refuses.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, LAYERS)]
    leading = {name: kinds for name, kinds in leading_kinds(model, names).items() if kinds}
    if not leading:
        return {}
    (whole, counted), found = _count_both(model, leading), {}
    for name, kinds in unread_kinds(model, [_Place(name) for name in leading]).items():
        if kinds:
            layer, share = model.get_submodule(name), (shares or {}).get(name)
            spent = []
            for of in (whole, counted):
                patches, all_macs = of.tokens[name] - len(leading[name]), of.by_module.get(name, 0)
                unread = [kind in kinds for kind in [*leading[name], *["patch"] * patches]]
                spent.append(_spend(layer, np.array(unread), all_macs / len(unread), share))
            (dense, _), (_, now) = spent
            found[name] = UnreadMacs(kinds, dense, now)
    return found


def _count_both(model: nn.Module, sites: Iterable[str]) -> tuple[MacCount, MacCount]:
    """Count a model with all of its tokens, and with those that are left."""
    counted = count(model, sites=sites)
    if not merge_costs(model):
        return counted, counted
    with unmerged(model):
        return count(model, sites=sites), counted


@dataclass(frozen=True)
class _Place:
    name: str

    def module(self, model: nn.Module) -> nn.Module:
        return model.get_submodule(self.name)


def _spend(
    layer: nn.Module, unread: np.ndarray, each: float, shares: torch.Tensor | None
) -> tuple[float, float]:
    """MACs for the tokens (bool) that nothing reads, dense and now; ``each`` token of others."""
    tokens, wasted = len(unread), int(unread.sum())
    if isinstance(layer, MoeMlp):
        ends = layer.fc1.in_features + layer.fc2.out_features
        dense, total = wasted * ends * layer.hidden_dense, tokens * layer.macs_per_token(shares)
        if not isinstance(layer.router, TokenKindRouter):
            return dense, total * wasted / tokens
        own = [ends * layer.expert_sizes[expert] for expert in layer.router.prefix.tolist()]
        now = sum(macs for macs, waste in zip(own, unread, strict=False) if waste)
        return dense, now + (total - sum(own) if unread[len(own) :].any() else 0)
    if isinstance(layer, LowRankAttention):
        site, ranks = layer.site, layer.ranks
        each = site.heads * (site.dim + tokens)  # MACs of a token for a dimension of the heads
        asked = int(unread[: ranks.queries].sum())
        return wasted * each * 2 * site.head_dim, asked * each * (ranks.scores + ranks.values)
    if isinstance(layer, ATTENTIONS):  # queries and scores, values and projections
        each = 2 * layer.proj.in_features * (layer.proj.out_features + tokens)
    return wasted * each, wasted * each


def macs(run: Run, images: ImageSet | None = None, *, routes: Routes | None = None) -> pd.DataFrame:
    """MACs of one image and stored parameters of a run, or of any model, by component.

    A routed layer costs its router plus ``2 d sum_e f_e |S_e|`` for each token; ``f_e`` are the
    routing shares of ``images``, of the ``routes`` they took, or else of the calibration.

    A row for every MLP, one for every attention of lower rank, one for finding the tokens that
    merge (``merging``), if any do, one for ``everything else``, one for the ``total``:
    ``component``, ``layer`` (-1 where it is no MLP), ``converted``, ``experts``, ``macs_dense``,
    ``macs_left`` (of the dense layer on the tokens that are left, as tokens merge), ``macs`` (per
    image; 1 MAC = 2 FLOPs), ``macs_unread_dense``, ``macs_unread``
    (those of them for tokens that nothing reads, in the modules of ``attrs["unread_sites"]``),
    ``params_dense``, ``params``, ``active_fraction`` (hidden neurons a token uses),
    ``union_fraction`` (those stored), ``share_source`` (calibration | evaluated images | dense).
    Raises MoeeError: ``routes`` do not fit the model's layers.
    """
    model = model_of(run)
    mlps, routed = all_mlps(model), {name: index for index, name in moe_names(model).items()}
    parts = mlps | reduced_attentions(model)
    if routes is None and images is not None and routed:
        routes = route(model, images)
    whole, counted = _count_both(model, parts)
    shares = {name: _choose_shares(routes, index, mlps[name]) for name, index in routed.items()}
    unread = unread_macs(model, shares=shares)
    rows = []
    for name, part in parts.items():
        tokens, first = counted.tokens[name], whole.tokens[name]
        spent = [of.by_module.get(name, 0) for of in (whole, counted, counted)]
        row = _describe_dense(name, spent, count_parameters(part), [unread.get(name)])
        if name in mlps:
            row |= {"layer": list(mlps).index(name)} | dict.fromkeys(_FRACTIONS, 1.0)
        else:
            row |= {"macs_dense": part.site.macs(first), "macs_left": part.site.macs(tokens)}
            row |= {"params_dense": part.site.parameters}
        if name in routed:
            row |= _describe_experts(part, (first, tokens), shares[name])
            row["share_source"] = "calibration" if routes is None else "evaluated images"
        rows.append(row)
    finding = [counted.by_module.get(name, 0) for name in merge_costs(model)]
    if finding:
        rows.append(_describe_dense("merging", (0, 0, sum(finding)), 0))
    before, outside = (of.replacing(dict.fromkeys(parts, 0.0)) for of in (whole, counted))
    outside -= sum(finding)
    stored = count_parameters(model) - sum(count_parameters(part) for part in parts.values())
    rest = [each for name, each in unread.items() if name not in parts]
    rows.append(_describe_dense("everything else", (before, outside, outside), stored, rest))
    table = pd.DataFrame([*rows, _sum_rows(rows, list(mlps.values()))])
    table = table.astype(dict.fromkeys(_WHOLE, "int64"))
    table.attrs |= {"caption": _caption(table, routes, unread), "unread_sites": list(unread)}
    return table


def _describe_dense(
    component: str,
    macs: Sequence[float],
    parameters: int,
    unread: Sequence[UnreadMacs | None] = (),
) -> dict[str, Any]:
    """A component that is as in the dense model, and what of it nothing reads.

    ``macs`` are those of all tokens, of those that are left, and now.
    """
    row = {"component": component, "layer": -1, "converted": False, "experts": 0}
    row |= dict(zip(("macs_dense", "macs_left", "macs"), macs, strict=True))
    row |= {"params_dense": parameters, "params": parameters}
    row |= dict.fromkeys(_FRACTIONS, math.nan) | {"share_source": "dense"}
    row["macs_unread_dense"] = sum(each.dense for each in unread if each)
    return row | {"macs_unread": sum(each.now for each in unread if each)}


def _choose_shares(routes: Routes | None, index: int, layer: MoeMlp) -> torch.Tensor:
    if routes is None:
        return layer.shares
    if index not in routes.counts or routes.counts[index].shape[1] != layer.n_experts:
        expected = f"routes of layer {index} among {layer.n_experts} experts"
        found = f"routes of '{routes.system}' through layers {routes.layers}"
        raise MoeeError(expected, found, "route the images through this model")
    return torch.from_numpy(routes.shares(index))


def _describe_experts(
    layer: MoeMlp, tokens: tuple[int, int], shares: torch.Tensor
) -> dict[str, Any]:
    """A routed layer of so many ``tokens`` at first, and left."""
    ends, hidden = layer.fc1.in_features + layer.fc2.out_features, layer.hidden_dense
    biases = layer.fc2.out_features + (0 if layer.fc1.bias is None else hidden)
    return {
        "converted": True,
        "experts": layer.n_experts,
        "macs_dense": tokens[0] * ends * hidden,
        "macs_left": tokens[1] * ends * hidden,
        "macs": tokens[1] * layer.macs_per_token(shares),
        "params_dense": ends * hidden + biases,
        **fractions(layer, shares),
    }


def fractions(layer: nn.Module, shares: torch.Tensor | None = None) -> dict[str, float | None]:
    """Shares of the dense hidden neurons that a token uses, and that are stored; None: of none."""
    if not isinstance(layer, MoeMlp):
        return dict.fromkeys(_FRACTIONS)
    shares = layer.shares if shares is None else shares
    active = float(shares.double() @ layer.sizes.to(shares.device).double())
    found = active / layer.hidden_dense, len(layer.kept) / layer.hidden_dense
    return dict(zip(_FRACTIONS, found, strict=True))


def _sum_rows(rows: list[dict[str, Any]], mlps: Sequence[nn.Module]) -> dict[str, Any]:
    """Sums; the fractions are means over all MLPs, weighted by their hidden neurons."""
    table = pd.DataFrame(rows)
    hidden = pd.Series([getattr(mlp, "hidden_dense", mlp.fc1.out_features) for mlp in mlps])
    means = table[_FRACTIONS].iloc[: len(mlps)].mul(hidden, axis=0).sum() / max(1, hidden.sum())
    total = _describe_dense("total", (0, 0, 0), 0) | table[_SUMS].sum().to_dict() | means.to_dict()
    sources = table.loc[table["converted"], "share_source"]
    if len(sources):
        total |= {"converted": True, "share_source": sources.iloc[0]}
    return total


def _caption(table: pd.DataFrame, routes: Routes | None, unread: Mapping[str, UnreadMacs]) -> str:
    total = table.iloc[-1]
    measured = {
        "dense": "no layer is routed",
        "calibration": "routing shares of the calibration",
        "evaluated images": f"routing shares measured on {routes.n_images if routes else 0} images",
    }
    return (
        "MACs of one image (1 MAC = 2 FLOPs; matrix products and convolutions, routers included; "
        "norms, softmax, activations and biases not counted); "
        f"{measured[total['share_source']]}. {_describe_unread(total, unread)}"
        "Parameters as stored, what experts share once."
    )


def _describe_unread(total: pd.Series, unread: Mapping[str, UnreadMacs]) -> str:
    """``Of these, 87.1 M (6.9 %) go to tokens that nothing reads: ...``, or nothing."""
    if not unread:
        return ""
    costs = []
    for part, whole in (("macs_unread_dense", "macs_dense"), ("macs_unread", "macs")):
        macs, percent = total[part], 100 * total[part] / total[whole]
        short = f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"
        costs.append(f"{short} ({percent:.1f} %)")
    dense, now = costs
    before = "" if dense == now else f", in the dense model {dense},"
    tokens = []
    for kinds in dict.fromkeys(each.kinds for each in unread.values()):
        names = [name for name, each in unread.items() if each.kinds == kinds]
        tokens.append(f"the {_join([NAMES[kind] for kind in kinds])} of {_join(names)}")
    return f"Of these, {now}{before} go to tokens that nothing reads: {'; '.join(tokens)}. "


def _join(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
