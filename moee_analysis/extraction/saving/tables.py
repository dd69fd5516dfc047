"""The tensors of a run against each other and the network they are of, before a layer is built.

Checksums reveal files that were damaged. What is refused here is what no extraction makes: lists
of neurons that are no experts, shares that are none, tensors of another network.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.saving.schema import LayerReport
from moee_analysis.models.attention import plain_attentions
from moee_analysis.models.weights import Tensors, differences
from moee_analysis.moe.layer import MoeMlp, all_mlps

HINT = "restore the run or extract again; a dense network that is given is the one it was made from"
TOLD = ("reason", "noise_share", "route_agreement")  # of a report: no layer shows them
CLOSE = 1e-3  # of shares, which are rounded where they are stored
LISTS = {
    "sizes": torch.int64, "kept": torch.int64, "neurons": torch.int64, "shares": torch.float32,
}  # fmt: skip


def check_tables(described: Mapping[str, Any], tensors: Tensors, dense: nn.Module) -> None:
    """Refuse tensors from which no layers of the ``dense`` network can be built.

    The values of the network do not matter. What is built has to fit the tensors (`check_fit`).

    Raises MoeeError: layers that the network has not; tensors of the rest of it that are
    missing, too many or of another shape; values that are not finite; lists of neurons that are
    no experts.
    """
    mlps, sites = all_mlps(dense), {site.name: site for site in plain_attentions(dense)}
    routers, attentions = described["routers"], described["attentions"]
    for unknown in [*(routers.keys() - mlps), *(attentions.keys() - sites)]:
        raise MoeeError(f"layers of {type(dense).__name__}", f"'{unknown}'", HINT)
    replaced = tuple(f"{name}." for name in (*routers, *attentions))
    expected, found = (
        {name: tensor for name, tensor in each.items() if not name.startswith(replaced)}
        for each in (dense.state_dict(), tensors)
    )
    check_fit(expected, found, dense)
    check_finite(tensors)
    for name, router in routers.items():
        for table, holds in _check_layer(select_below(name, tensors), router, mlps[name].fc1):
            if not holds:
                raise MoeeError(f"tables of experts in '{name}'", f"{table} of none", HINT)
    for name, ranks in attentions.items():
        if max(ranks["scores"], ranks["values"]) > sites[name].head_dim:
            raise MoeeError(f"ranks of an attention in '{name}'", f"{dict(ranks)}", HINT)


def check_fit(expected: Tensors, tensors: Tensors, network: nn.Module) -> None:
    """Refuse ``tensors`` of other names, shapes or types than those ``expected`` of a network."""
    wrong = differences(expected, tensors)
    for name, own in expected.items() if not wrong else ():
        if tensors[name].dtype != own.dtype:
            wrong = f"{name} is {tensors[name].dtype}, not {own.dtype}"
    if wrong:
        raise MoeeError(f"the tensors of a run of {type(network).__name__}", wrong, HINT)


def check_finite(tensors: Tensors) -> None:
    """Refuse tensors with infinite values or NaN."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MoeeError("finite weights", f"NaN or infinity in {name}", HINT)


def check_reports(reports: Sequence[LayerReport], model: nn.Module) -> None:
    """Refuse reports that are not those of all MLPs of a run's ``model``, in order.

    Raises MoeeError: it names the first one.
    """
    mlps = all_mlps(model)
    if len(reports) != len(mlps):
        raise MoeeError(f"reports of {len(mlps)} layers", f"{len(reports)} of them", HINT)
    for index, (report, (name, mlp)) in enumerate(zip(reports, mlps.items(), strict=True)):
        shown = report_mlp(index, name, mlp)
        fractions = ("active_fraction", "union_fraction")
        rounding = [abs(getattr(report, each) - getattr(shown, each)) for each in fractions]
        told = {each: getattr(report, each) for each in (*TOLD, *fractions)}
        if report != replace(shown, **told) or max(rounding) > CLOSE:
            found = f"one of '{report.name}' that contradicts it"
            raise MoeeError(f"a report of layer {index}, '{name}'", found, HINT)


def report_mlp(index: int, name: str, mlp: nn.Module) -> LayerReport:
    """Report what an MLP, routed or dense, shows of what became of it: all but :data:`TOLD`."""
    if not isinstance(mlp, MoeMlp):
        return LayerReport(index, name, mlp.fc1.out_features, converted=False, reason="")
    active, hidden = float(mlp.shares.double() @ mlp.sizes.double()), mlp.hidden_dense
    return LayerReport(
        index, name, hidden, converted=True, reason="", experts=mlp.n_experts,
        active_fraction=active / hidden, union_fraction=len(mlp.kept) / hidden,
        sizes=tuple(mlp.expert_sizes),
    )  # fmt: skip


def select_below(name: str, tensors: Tensors) -> Tensors:
    """The tensors of the submodule called ``name``, under the names they have there."""
    start = f"{name}."
    return {key.removeprefix(start): t for key, t in tensors.items() if key.startswith(start)}


def _check_layer(
    saved: Tensors, router: Mapping[str, Any], fc1: nn.Linear
) -> Iterator[tuple[str, torch.Tensor | bool]]:
    """Names of a layer's tables, and whether they hold; each makes sense if those before do."""
    for name, dtype in LISTS.items():
        yield name, name in saved and saved[name].dtype == dtype and saved[name].ndim == 1
    sizes, kept, neurons, shares = (saved[name] for name in LISTS)
    yield "sizes", len(sizes) > 0
    yield "sizes", sizes.min() >= 0 and sizes.max() <= len(kept) and sizes.sum() == len(neurons)
    yield "kept", _ascends(kept) and ((kept >= 0) & (kept < fc1.out_features)).all()
    yield "neurons", torch.equal(neurons.unique(), torch.arange(len(kept)))
    expert = torch.arange(len(sizes)).repeat_interleave(sizes)
    yield "neurons", _ascends(expert * len(kept) + neurons)
    yield "shares", len(shares) == len(sizes)
    yield "shares", (shares >= 0).all() and abs(shares.sum() - 1) <= CLOSE
    start, experts = "router", len(sizes)
    while router["kind"] == "token_kinds":  # leading tokens have experts of their own
        experts -= 1 + max(router["prefix"], default=-1)
        router, start = router["inner"], f"{start}.inner"
    yield "router", experts > 0
    yield from _check_router(select_below(start, saved), router["kind"], experts, fc1.in_features)


def _check_router(
    saved: Tensors, kind: str, experts: int, dim: int
) -> Iterator[tuple[str, torch.Tensor | bool]]:
    """The same for the router of tokens (n, dim) that are not leading."""
    projection = saved.get("projection")
    rank = dim if projection is None else sum(projection.shape[:1])
    expected = {
        "constant": {"expert": ()},
        "cosine": {"centres": (experts, dim)},
        "nearest": {"directions": (experts, rank), "offsets": (experts,)},
    }[kind]
    if projection is not None:
        expected["projection"] = (rank, dim)
    yield "router", {name: tuple(t.shape) for name, t in saved.items()} == expected
    yield "router", kind != "constant" or 0 <= saved["expert"] < experts


def _ascends(numbers: torch.Tensor) -> torch.Tensor:
    return (numbers.diff() > 0).all()
