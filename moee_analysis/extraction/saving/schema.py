"""The facts of a run: every field of ``run.json``, its type and its range (``run.schema.json``).

No other fields are taken, but among the arguments of a network and in the record of its origin.
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import fastjsonschema

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import (
    REMOVED,
    REMOVED_CLUSTERING,
    ClusterConfig,
    ExtractConfig,
)

Schema = dict[str, Any]

HINT = "restore the file, or extract again"
FIRST = 5
"""The format whose models have neither answers nor arguments of ``timm.create_model``."""

LATER = ("arguments", "dtype", "answers", "by_hand", "transform_sha256")


@dataclass(frozen=True)
class LayerReport:
    """What became of one MLP layer.

    ``noise_share`` is the share of clustered tokens in no cluster, ``route_agreement`` the share
    of clustered tokens that the router sends to their own cluster, ``active_fraction`` the
    expected share of hidden neurons a token uses, ``union_fraction`` the share still stored.
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


REMOVED_FROM = {
    ExtractConfig: REMOVED, ClusterConfig: REMOVED_CLUSTERING,
    LayerReport: ("thin", "dense_tokens"),
}  # fmt: skip
"""Fields that runs of earlier versions may have."""


def check_facts(facts: Mapping[str, Any], source: Path) -> None:
    """Refuse the facts of a run, read from ``source``, unless every field can be one's.

    Raises MoeeError: it names the first field that is missing, unknown, of another type or out of
    its range.
    """
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
    simple = {
        int: integer, float: number, str: {"type": "string"}, bool: {"type": "boolean"},
        NoneType: {"type": "null"},
    }  # fmt: skip
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {f.name: _schema_of(hints[f.name], integer, number) for f in fields(hint)}
        removed = {name: {} for name in REMOVED_FROM[hint] if name not in known}
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


@cache
def _schema() -> Schema:
    """The schema in the file beside this one, with those of the dataclasses in it."""
    schema = json.loads(Path(__file__).with_name("run.schema.json").read_text())
    count, share = ({"$ref": f"#/definitions/{name}"} for name in ("count", "share"))
    schema["definitions"] |= {
        "config": _schema_of(ExtractConfig, {"type": "integer"}, {"type": "number"}),
        "report": _schema_of(LayerReport, count, share),
    }
    return schema


@cache
def _validator(run_format: int) -> Callable[[Any], Any]:
    schema = copy.deepcopy(_schema())
    if run_format == FIRST:
        for part in ("model", "provenance"):
            required = schema["definitions"][part]["required"]
            required[:] = [name for name in required if name not in LATER]
    return fastjsonschema.compile(schema)


INPUT_FACTS = tuple(_schema()["definitions"]["input"]["properties"])
"""Entries of ``pretrained_cfg`` that are kept."""
