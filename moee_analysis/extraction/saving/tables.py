"""The tensors of a run against each other and the network they are of, before a layer is built.

Checksums tell files that were damaged. What is told here is what no extraction makes: lists of
neurons that are no experts, shares that are none, tensors of another network.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.saving.layer_report import LayerReport
from moee_analysis.models.attention import AttentionSite, plain_attentions
from moee_analysis.models.state_dicts import Tensors, differences
from moee_analysis.moe.layer import MoeMlp, all_mlps

HINT = "restore the run or extract again; a dense network that is given is the one it was made from"
CLOSE = 1e-3  # of shares, which are rounded where they are stored


def check_tables(described: Mapping[str, Any], tensors: Tensors, dense: nn.Module) -> None:
    """Refuse tensors that no run of the ``dense`` network has; its own values do not matter.

    Raises
    ------
    MoeeError
        Layers that the network has not; tensors that are missing, too many or of another shape or
        type; values that are not finite; lists of neurons that are no experts.
    """
    expected = _expected(described, tensors, dense)
    wrong = differences(expected, tensors) or _of_other_types(expected, tensors)
    if wrong:
        raise MoeeError(f"the tensors of a run of {type(dense).__name__}", wrong, HINT)
    check_finite(tensors)
    for name, router in described["routers"].items():
        hidden = dense.get_submodule(name).fc1.out_features
        checked = _checked(below(name, tensors), router, hidden)
        wrong = next((table for table, holds in checked if not holds), None)
        if wrong:
            raise MoeeError(f"tables of experts in '{name}'", f"{wrong} of none", HINT)


def check_finite(tensors: Tensors) -> None:
    """Refuse tensors with infinite values or NaN."""
    wrong = [k for k, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()]
    if wrong:
        raise MoeeError("finite weights", f"NaN or infinity in {wrong[0]}", HINT)


def check_reports(reports: Sequence[LayerReport], model: nn.Module) -> None:
    """Refuse reports that are not those of all MLPs of a run's ``model``, in order.

    Raises
    ------
    MoeeError
        It names the first one.
    """
    mlps = all_mlps(model)
    if len(reports) != len(mlps):
        raise MoeeError(f"reports of {len(mlps)} layers", f"{len(reports)} of them", HINT)
    for index, (report, name) in enumerate(zip(reports, mlps, strict=True)):
        if (report.index, report.name) != (index, name) or not _tells(report, mlps[name]):
            found = f"one of '{report.name}' that contradicts it"
            raise MoeeError(f"a report of layer {index}, '{name}'", found, HINT)


def below(name: str, tensors: Tensors) -> Tensors:
    """The tensors of the submodule called ``name``, under the names they have there."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _tells(report: LayerReport, mlp: nn.Module) -> bool:
    """Whether a report is of this MLP, routed or dense."""
    if isinstance(mlp, MoeMlp):
        sizes, hidden, stored = tuple(mlp.expert_sizes), mlp.hidden_dense, len(mlp.kept)
        active = float(mlp.shares.double() @ mlp.sizes.double())
    else:
        sizes, hidden = (), mlp.fc1.out_features
        active = stored = hidden
    told = report.converted, report.hidden, report.experts, report.sizes
    errors = report.active_fraction * hidden - active, report.union_fraction * hidden - stored
    same = told == (isinstance(mlp, MoeMlp), hidden, len(sizes), sizes)
    return same and max(map(abs, errors)) <= CLOSE * hidden


def _of_other_types(expected: Tensors, tensors: Tensors) -> str:
    pairs = ((name, tensors[name].dtype, own.dtype) for name, own in expected.items())
    wrong = (f"{name} is {found}, not {own}" for name, found, own in pairs if found != own)
    return next(wrong, "")


def _expected(described: Mapping[str, Any], tensors: Tensors, dense: nn.Module) -> Tensors:
    """Tensors without values, of the names, shapes and types that the run must have."""
    mlps, sites = all_mlps(dense), {site.name: site for site in plain_attentions(dense)}
    unknown = [*(described["routers"].keys() - mlps), *(described["attentions"].keys() - sites)]
    if unknown:
        raise MoeeError(f"layers of {type(dense).__name__}", f"'{unknown[0]}'", HINT)
    made = {
        name: _layer(below(name, tensors), mlps[name], router)
        for name, router in described["routers"].items()
    } | {
        name: _attention(ranks, sites[name], sites[name].module(dense))
        for name, ranks in described["attentions"].items()
    }
    gone = tuple(f"{name}.{part}." for name in made for part in ("fc1", "fc2", "qkv", "proj"))
    kept = {key: t for key, t in dense.state_dict().items() if not key.startswith(gone)}
    return kept | {f"{name}.{key}": t for name, own in made.items() for key, t in own.items()}


def _layer(saved: Tensors, mlp: Mlp, router: Mapping[str, Any]) -> Tensors:
    """What a routed layer stores, its experts as many and as large as ``saved``."""
    kept, listed, experts = (_count(saved, name) for name in ("kept", "neurons", "sizes"))
    dim, inputs = mlp.fc2.out_features, mlp.fc1.in_features
    table, weight = partial(_empty, torch.int64), partial(_empty, mlp.fc1.weight.dtype)
    optional = {"columns": table(listed), "shift": weight(experts, dim)}
    return {
        "kept": table(kept),
        "neurons": table(listed),
        "sizes": table(experts),
        "shares": _empty(torch.float32, experts),
        "fc1.weight": weight(kept, inputs),
        **({} if mlp.fc1.bias is None else {"fc1.bias": weight(kept)}),
        "fc2.weight": weight(dim, listed if "columns" in saved else kept),
        "fc2.bias": weight(dim),
        **{name: tensor for name, tensor in optional.items() if name in saved},
        **_router(saved, router, experts, like=weight(inputs)),
    }


def _router(
    saved: Tensors, router: Mapping[str, Any], experts: int, *, like: torch.Tensor
) -> Tensors:
    """What the router of a layer of so many experts stores; tokens are ``like`` this one."""
    start, kind, experts = _of_patches(router, experts)
    if kind == "constant":
        return {f"{start}.expert": _empty(torch.int64)}
    if kind == "cosine":
        return {f"{start}.centres": like.new_empty(experts, len(like))}
    projection = saved.get(f"{start}.projection")
    rank = len(like) if projection is None else sum(projection.shape[:1])
    made = {"directions": like.new_empty(experts, rank), "offsets": like.new_empty(experts)}
    if projection is not None:
        made["projection"] = like.new_empty(rank, len(like))
    return {f"{start}.{name}": tensor for name, tensor in made.items()}


def _of_patches(router: Mapping[str, Any], experts: int) -> tuple[str, str, int]:
    """Name, kind and number of experts of the router that leading tokens do not come to."""
    start = "router"
    while router["kind"] == "token_kinds":
        experts -= 1 + max(router["prefix"], default=-1)
        router, start = router["inner"], f"{start}.inner"
    if experts < 1:
        raise MoeeError("experts for other tokens than the leading ones", "none", HINT)
    return start, router["kind"], experts


def _attention(ranks: Mapping[str, Any], site: AttentionSite, dense: Attention) -> Tensors:
    """What an attention of these ranks stores."""
    scores, values = site.heads * ranks["scores"], site.heads * ranks["values"]
    weight = partial(_empty, dense.proj.weight.dtype)
    return {
        "kvq.weight": weight(2 * scores + values, site.dim),
        "proj.weight": weight(site.dim, values),
        "proj.bias": weight(site.dim),
        **({"bias": weight(scores)} if ranks["bias"] else {}),
    }


def _checked(
    saved: Tensors, router: Mapping[str, Any], hidden: int
) -> Iterator[tuple[str, torch.Tensor | bool]]:
    """Names of a layer's tables, and whether they hold; each makes sense if those before do."""
    kept, neurons, sizes, shares = (saved[key] for key in ("kept", "neurons", "sizes", "shares"))
    yield "sizes", sizes.min() >= 0 and sizes.max() <= len(kept) and sizes.sum() == len(neurons)
    yield "kept", _ascends(kept) and ((kept >= 0) & (kept < hidden)).all()
    yield "neurons", torch.equal(neurons.unique(), torch.arange(len(kept)))
    expert = torch.arange(len(sizes)).repeat_interleave(sizes)
    yield "neurons", _ascends(expert * len(kept) + neurons)
    every = torch.arange(len(neurons))
    yield "columns", torch.equal(saved.get("columns", every), every)
    yield "shares", (shares >= 0).all() and abs(shares.sum() - 1) <= CLOSE
    start, kind, experts = _of_patches(router, len(sizes))
    yield "router.expert", kind != "constant" or 0 <= saved[f"{start}.expert"] < experts


def _ascends(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.diff() > 0).all()


def _count(saved: Tensors, name: str) -> int:
    return saved[name].numel() if name in saved else 0


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    sides = [max(side, 0) for side in shape]  # timm builds attentions of fewer than no heads
    return torch.empty(sides, dtype=dtype, device="meta")
