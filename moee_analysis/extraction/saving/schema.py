"""The facts of a run: every field of ``run.json``, its type and its range (``run.schema.json``).

No other fields are taken, but among the arguments of a network and in the record of its origin.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fastjsonschema

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import (
    REMOVED,
    REMOVED_CLUSTERING,
    ClusterConfig,
    ExtractConfig,
)
from moee_analysis.extraction.saving import layer_report
from moee_analysis.extraction.saving.layer_report import LayerReport

Schema = dict[str, Any]

HINT = "restore the file, or extract again"
FIRST = 5
"""The format whose models have neither answers nor arguments of ``timm.create_model``."""

LATER = ("arguments", "dtype", "answers", "by_hand", "transform_sha256")
REMOVED_FROM = {
    ExtractConfig: REMOVED, ClusterConfig: REMOVED_CLUSTERING, LayerReport: layer_report.REMOVED,
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
    for found in _contradictions(facts):
        raise MoeeError(f"facts of one run in '{source}'", found, HINT)


def _contradictions(facts: Mapping[str, Any]) -> Iterator[str]:
    """Pairs of fields that cannot be of one run."""
    model, provenance = facts["model"], facts["provenance"]
    names = {model["architecture"], model["pretrained_cfg"]["architecture"], provenance["model"]}
    if len(names) > 1:
        yield f"several architectures ({', '.join(sorted(names))})"
    for tuning in provenance.get("finetunings", []):
        epochs = [row["epoch"] for row in tuning["history"]]
        if epochs != list(range(len(epochs))) or tuning["best"] not in epochs:
            yield f"a history of epochs {epochs[:3]}... of which {tuning['best']} is the best"


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
