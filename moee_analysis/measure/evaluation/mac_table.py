"""Where the multiply-accumulates and the parameters go, next to the dense model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
import torch
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.unread_macs import UnreadMacs, unread_macs
from moee_analysis.measure.routing.resolve import model_of
from moee_analysis.measure.routing.routes import Routes
from moee_analysis.measure.routing.routes import routes as route
from moee_analysis.models.attention import LowRankAttention, reduced_attentions
from moee_analysis.models.macs import MacCount, count, count_parameters
from moee_analysis.moe.layer import MoeMlp, all_mlps

ELSEWHERE = "everything else"
TOTAL = "total"
NAMES = {
    "cls": "CLS token", "dist": "distillation token", "register": "registers", "patch": "patches",
}  # fmt: skip

_WHOLE = dict.fromkeys(("layer", "experts", "macs_dense", "params_dense", "params"), "int64")
_SUMS = [
    "experts", "macs_dense", "macs", "macs_unread_dense", "macs_unread", "params_dense", "params",
]  # fmt: skip
_FRACTIONS = ["active_fraction", "union_fraction"]


def macs(
    run: Extraction | nn.Module,
    images: ImageSet | None = None,
    *,
    routes: Routes | None = None,
    batch_size: int | None = None,
) -> pd.DataFrame:
    """MACs of one image and stored parameters of a run, or of any model, by component.

    A routed layer costs its router plus ``2 d sum_e f_e |S_e|`` for each token; ``f_e`` are the
    routing shares of ``images``, or of ``routes`` where they have been routed already, or else
    of the calibration. What is spent on tokens that nothing reads is counted, and told apart
    (``unread_macs``).

    A row for every MLP, one for every attention of lower rank, one for ``everything else``, one for
    the ``total``: ``component``, ``layer`` (-1 where it is no MLP), ``converted``, ``experts``,
    ``macs_dense``, ``macs`` (per image; 1 MAC = 2 FLOPs), ``macs_unread_dense``, ``macs_unread``
    (those of them for tokens that nothing reads), ``params_dense``, ``params``, ``active_fraction``
    (hidden neurons a token uses), ``union_fraction`` (hidden neurons stored), ``share_source``
    (``calibration``, ``evaluated images`` or ``dense``). ``attrs["unread_sites"]`` are the names of
    the modules with tokens that nothing reads.
    Raises MoeeError: ``routes`` do not fit the model's layers.
    """
    model = model_of(run)
    mlps, reduced = all_mlps(model), reduced_attentions(model)
    routed = {
        name: index for index, (name, mlp) in enumerate(mlps.items()) if isinstance(mlp, MoeMlp)
    }
    if routes is None and images is not None and routed:
        routes = route(model, images, batch_size=batch_size)
    counted = count(model, sites=mlps | reduced)
    shares = {name: _shares(routes, index, mlps[name]) for name, index in routed.items()}
    source = "calibration" if routes is None else "evaluated images"
    rows = [
        _routed_row(name, mlp, counted, shares[name]) | {"layer": index, "share_source": source}
        if name in routed
        else _row(name, counted.by_module[name], count_parameters(mlp))
        | {"layer": index, "active_fraction": 1.0, "union_fraction": 1.0}
        for index, (name, mlp) in enumerate(mlps.items())
    ]
    rows += [_attention_row(name, each, counted) for name, each in reduced.items()]
    outside = counted.replacing(dict.fromkeys(mlps | reduced, 0.0))
    inside = sum(count_parameters(part) for part in (mlps | reduced).values())
    rows.append(_row(ELSEWHERE, outside, count_parameters(model) - inside))
    unread = unread_macs(model, shares=shares)
    rows = [row | _unread(row["component"], unread, [*mlps, *reduced]) for row in rows]
    table = pd.DataFrame([*rows, _total(rows, list(mlps.values()))]).astype(_WHOLE)
    table.attrs |= {"caption": _caption(table, routes, unread), "unread_sites": list(unread)}
    return table


def _row(component: str, macs: float, parameters: int) -> dict[str, Any]:
    """A component that is as in the dense model."""
    return {
        "component": component,
        "layer": -1,
        "converted": False,
        "experts": 0,
        "macs_dense": macs,
        "macs": macs,
        "params_dense": parameters,
        "params": parameters,
        "active_fraction": math.nan,
        "union_fraction": math.nan,
        "share_source": "dense",
    }


def _shares(routes: Routes | None, index: int, layer: MoeMlp) -> torch.Tensor:
    if routes is None:
        return layer.shares
    if index not in routes.counts or routes.counts[index].shape[1] != layer.n_experts:
        raise MoeeError(
            f"routes of layer {index} among {layer.n_experts} experts",
            f"routes of '{routes.system}' through layers {routes.layers}",
            "route the images through this model",
        )
    return torch.from_numpy(routes.shares(index))


def _routed_row(
    name: str, layer: MoeMlp, counted: MacCount, shares: torch.Tensor
) -> dict[str, Any]:
    ends = layer.fc1.in_features + layer.fc2.out_features
    hidden, tokens = layer.hidden_dense, counted.tokens[name]
    biases = layer.fc2.out_features + (0 if layer.fc1.bias is None else hidden)
    sizes = layer.sizes.to(shares.device)
    return _row(name, tokens * layer.macs_per_token(shares), count_parameters(layer)) | {
        "converted": True,
        "experts": layer.n_experts,
        "macs_dense": tokens * ends * hidden,
        "params_dense": ends * hidden + biases,
        "active_fraction": float(shares.double() @ sizes.double()) / hidden,
        "union_fraction": len(layer.kept) / hidden,
    }


def _attention_row(name: str, attention: LowRankAttention, counted: MacCount) -> dict[str, Any]:
    return _row(name, counted.by_module[name], count_parameters(attention)) | {
        "macs_dense": attention.site.macs(counted.tokens[name]),
        "params_dense": attention.site.parameters,
    }


def _unread(
    component: str, unread: Mapping[str, UnreadMacs], named: Sequence[str]
) -> dict[str, float]:
    """MACs of a component for tokens that nothing reads; elsewhere is all that is not named."""
    own = [component] if component != ELSEWHERE else [name for name in unread if name not in named]
    found = [unread[name] for name in own if name in unread]
    return {
        "macs_unread_dense": sum(each.dense for each in found),
        "macs_unread": sum(each.now for each in found),
    }


def _total(rows: list[dict[str, Any]], mlps: Sequence[nn.Module]) -> dict[str, Any]:
    """Sums; the fractions are means over all MLPs, weighted by their hidden neurons."""
    table = pd.DataFrame(rows)
    widths = [mlp.hidden_dense if isinstance(mlp, MoeMlp) else mlp.fc1.out_features for mlp in mlps]
    hidden = pd.Series(widths)
    means = table[_FRACTIONS].iloc[: len(mlps)].mul(hidden, axis=0).sum() / max(1, hidden.sum())
    sources = table.loc[table["converted"], "share_source"]
    return {
        "component": TOTAL,
        "layer": -1,
        "converted": bool(table["converted"].any()),
        **table[_SUMS].sum().to_dict(),
        **means.to_dict(),
        "share_source": sources.iloc[0] if len(sources) else "dense",
    }


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
    dense, now = (
        f"{_short(total[part])} ({100 * total[part] / total[whole]:.1f} %)"
        for part, whole in (("macs_unread_dense", "macs_dense"), ("macs_unread", "macs"))
    )
    before = "" if dense == now else f", in the dense model {dense},"
    of_kinds: dict[tuple[str, ...], list[str]] = {}
    for name, each in unread.items():
        of_kinds.setdefault(each.kinds, []).append(name)
    tokens = "; ".join(
        f"the {_listed([NAMES[kind] for kind in kinds])} of {_listed(names)}"
        for kinds, names in of_kinds.items()
    )
    return f"Of these, {now}{before} go to tokens that nothing reads: {tokens}. "


def _short(macs: float) -> str:
    return f"{macs / 1e9:.2f} G" if macs >= 1e9 else f"{macs / 1e6:.1f} M"


def _listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
