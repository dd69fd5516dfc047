"""What a saved run may hold: fields of ``run.json`` (``run.schema.json``), and tensors.

Refused is what no extraction makes: other fields, but among the arguments of a network and in the
record of its origin; lists of neurons that are no experts; tensors of another network.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import fastjsonschema
import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import REMOVED, ExtractConfig
from moee_analysis.models.attention import plain_attentions
from moee_analysis.models.weights import Tensors, differences
from moee_analysis.moe.layer import MoeMlp, all_mlps

Schema = dict[str, Any]
Checks = Iterator[tuple[str, torch.Tensor | bool]]  # names of tables, and whether they hold

HINT = "restore the file, or extract again"
TENSORS_HINT = f"{HINT}; a dense network that is given is the one it was made from"
TOLD = ("reason", "noise_share", "route_agreement")  # of a report: no layer shows them
CLOSE = 1e-3  # of shares, which are rounded where they are stored
LISTS = dict.fromkeys(("sizes", "kept", "neurons"), torch.int64) | {"shares": torch.float32}
LATER = {  # fields that were not there yet in files of this format, or of those before it
    5: ("arguments", "dtype", "answers", "by_hand", "transform_sha256"),
    6: ("merging", "merges", "budget_in", "for_batch"),
}


@dataclass(frozen=True)
class LayerReport:
    """What became of one MLP layer.

    ``noise_share`` is the share of clustered tokens in no cluster, ``route_agreement`` that of
    those that the router sends to their own; ``active_fraction`` is the expected share of hidden
    neurons a token uses, ``union_fraction`` the share still stored.
    """

    index: int
    name: str
    hidden: int
    converted: bool
    reason: str
    experts: int = 0
    noise_share: float = 0.0
    route_agreement: float = 1.0
    active_fraction: float = 1.0
    union_fraction: float = 1.0
    sizes: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """Rebuild a report from ``dataclasses.asdict`` after a trip through JSON."""
        known = {each.name: content[each.name] for each in fields(cls)}
        return cls(**known | {"sizes": tuple(known["sizes"])})


REMOVED_FROM = REMOVED | {"LayerReport": ("thin", "dense_tokens")}  # fields of earlier versions


def check_facts(facts: Mapping[str, Any], source: Path) -> None:
    """Refuse the facts of a run, read from ``source``, unless every field can be one's."""
    try:
        _validator(facts["format"])(facts)
    except fastjsonschema.JsonSchemaValueException as error:
        found = str(error).removeprefix("data.")
        raise MoeeError(f"the facts of a run in '{source}'", found[:200], HINT) from None
    ExtractConfig.from_json(facts["config"])
    model, provenance = facts["model"], facts["provenance"]
    names = {model["architecture"], model["pretrained_cfg"]["architecture"], provenance["model"]}
    wrong = [f"several architectures ({', '.join(sorted(names))})"] if len(names) > 1 else []
    for tuning in provenance.get("finetunings", []):
        epochs, best = [row["epoch"] for row in tuning["history"]], tuning["best"]
        if epochs != list(range(len(epochs))) or best not in epochs:
            wrong.append(f"a history of epochs {epochs[:3]}... of which {best} is the best")
    if wrong:
        raise MoeeError(f"facts of one run in '{source}'", wrong[0], HINT)


def _schema_of(hint: Any, integer: Schema, number: Schema) -> Schema:
    """The schema of a dataclass or of a field; ``integer`` and ``number`` are those of numbers."""
    simple = {int: integer, float: number}
    simple |= {str: {"type": "string"}, bool: {"type": "boolean"}, NoneType: {"type": "null"}}
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {f.name: _schema_of(hints[f.name], integer, number) for f in fields(hint)}
        removed = {name: {} for name in REMOVED_FROM[hint.__name__] if name not in known}
        return {
            "type": "object", "properties": known | removed, "required": list(known),
            "additionalProperties": False,
        }  # fmt: skip
    if get_origin(hint) is Literal:
        return {"type": "string"}  # the dataclass knows the names
    if get_origin(hint) is tuple:
        of = _schema_of(get_args(hint)[0], integer, number)
        return {"type": "array", "items": of, "maxItems": 10**4}
    return {"anyOf": [_schema_of(each, integer, number) for each in get_args(hint)]}


def _schema() -> Schema:
    """The schema in the file beside this one, with those of the dataclasses in it."""
    schema = json.loads(Path(__file__).with_name("run.schema.json").read_text())
    count, share = ({"$ref": f"#/definitions/{name}"} for name in ("count", "share"))
    own = schema["definitions"]
    own["config"] = _schema_of(ExtractConfig, {"type": "integer"}, {"type": "number"})
    own["report"] = _schema_of(LayerReport, count, share)
    return schema


@cache
def _validator(run_format: int) -> Callable[[Any], Any]:
    schema = _schema()
    later = [name for last, names in LATER.items() if run_format <= last for name in names]
    for part in ("model", "config", "provenance"):
        required = schema["definitions"][part]["required"]
        required[:] = [name for name in required if name not in later]
    return fastjsonschema.compile(schema)


INPUT_FACTS = tuple(_schema()["definitions"]["input"]["properties"])  # of ``pretrained_cfg``


def check_tables(described: Mapping[str, Any], tensors: Tensors, dense: nn.Module) -> None:
    """Refuse tensors from which no layers of the ``dense`` network, of any values, can be built.

    Raises MoeeError: unknown layers; other tensors that do not fit, or infinite ones; no experts.
    """
    mlps, sites = all_mlps(dense), {site.name: site for site in plain_attentions(dense)}
    routers, attentions = described["routers"], described["attentions"]
    for unknown in [*(routers.keys() - mlps), *(attentions.keys() - sites)]:
        raise MoeeError(f"layers of {type(dense).__name__}", f"'{unknown}'", TENSORS_HINT)
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
                raise MoeeError(f"tables of experts in '{name}'", f"{table} of none", TENSORS_HINT)
    for name, ranks in attentions.items():
        if max(ranks["scores"], ranks["values"]) > sites[name].head_dim:
            raise MoeeError(f"ranks of an attention in '{name}'", f"{dict(ranks)}", TENSORS_HINT)


def check_fit(expected: Tensors, tensors: Tensors, network: nn.Module) -> None:
    """Refuse ``tensors`` of other names, shapes or types than those ``expected`` of a network."""
    wrong = differences(expected, tensors)
    for name, own in expected.items() if not wrong else ():
        if tensors[name].dtype != own.dtype:
            wrong = f"{name} is {tensors[name].dtype}, not {own.dtype}"
    if wrong:
        raise MoeeError(f"the tensors of a run of {type(network).__name__}", wrong, TENSORS_HINT)


def check_finite(tensors: Tensors) -> None:
    """Refuse tensors with infinite values or NaN."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise MoeeError("finite weights", f"NaN or infinity in {name}", TENSORS_HINT)


def check_reports(reports: Sequence[LayerReport], model: nn.Module) -> None:
    """Refuse reports that are not those of all MLPs of a run's ``model``, in order."""
    mlps = all_mlps(model)
    if len(reports) != len(mlps):
        raise MoeeError(f"reports of {len(mlps)} layers", f"{len(reports)} of them", TENSORS_HINT)
    for index, (report, (name, mlp)) in enumerate(zip(reports, mlps.items(), strict=True)):
        shown = report_mlp(index, name, mlp)
        fractions = ("active_fraction", "union_fraction")
        rounding = [abs(getattr(report, each) - getattr(shown, each)) for each in fractions]
        told = {each: getattr(report, each) for each in (*TOLD, *fractions)}
        if report != replace(shown, **told) or max(rounding) > CLOSE:
            found = f"one of '{report.name}' that contradicts it"
            raise MoeeError(f"a report of layer {index}, '{name}'", found, TENSORS_HINT)


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


def _check_layer(saved: Tensors, router: Mapping[str, Any], fc1: nn.Linear) -> Checks:
    """Checks of a layer's tables, each of which makes sense if those before hold."""
    for name, dtype in LISTS.items():
        yield name, name in saved and saved[name].dtype == dtype and saved[name].ndim == 1
    sizes, kept, neurons, shares = (saved[name] for name in LISTS)
    yield "sizes", len(sizes) > 0
    yield "sizes", sizes.min() >= 0 and sizes.max() <= len(kept) and sizes.sum() == len(neurons)
    yield "kept", (kept.diff() > 0).all() and ((kept >= 0) & (kept < fc1.out_features)).all()
    yield "neurons", torch.equal(neurons.unique(), torch.arange(len(kept)))
    expert = torch.arange(len(sizes)).repeat_interleave(sizes)
    yield "neurons", ((expert * len(kept) + neurons).diff() > 0).all()
    yield "shares", len(shares) == len(sizes)
    yield "shares", (shares >= 0).all() and abs(shares.sum() - 1) <= CLOSE
    start, experts = "router", len(sizes)
    while router["kind"] == "token_kinds":  # leading tokens have experts of their own
        experts -= 1 + max(router["prefix"], default=-1)
        router, start = router["inner"], f"{start}.inner"
    yield "router", experts > 0
    yield from _check_router(select_below(start, saved), router["kind"], experts, fc1.in_features)


def _check_router(saved: Tensors, kind: str, experts: int, dim: int) -> Checks:
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
