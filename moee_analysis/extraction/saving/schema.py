"""What the facts of a run are: every field of ``run.json``, its type and its range.

No other fields are taken, but among the arguments of a network and what is told of its origin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import fastjsonschema

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.config.recipes import TOKEN_KINDS
from moee_analysis.utils.checks import LAST_SEED

Schema = dict[str, Any]

HINT = "restore the file, or extract again"
FIRST = 5
"""The format whose models have neither answers nor arguments of ``timm.create_model``."""

LATER = ("arguments", "dtype", "answers", "by_hand", "transform_sha256")
JSON_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", NoneType: "null"}


def check_facts(facts: Mapping[str, Any], source: Path) -> None:
    """Refuse the facts of a run, read from ``source``, unless every field can be one's.

    Raises
    ------
    MoeeError
        It names the first field that is missing, unknown, of another type or out of its range.
    """
    try:
        _validator(facts["format"])(facts)
    except fastjsonschema.JsonSchemaValueException as error:
        told = str(error).removeprefix("data.")
        raise MoeeError(f"the facts of a run in '{source}'", told[:200], HINT) from None
    ExtractConfig.from_json(facts["config"])
    for told in _contradictions(facts):
        raise MoeeError(f"facts of one run in '{source}'", told, HINT)


def _contradictions(facts: Mapping[str, Any]) -> Iterator[str]:
    """What no field shows by itself."""
    model, provenance = facts["model"], facts["provenance"]
    names = {model["architecture"], model["pretrained_cfg"]["architecture"], provenance["model"]}
    if len(names) > 1:
        yield f"several architectures ({', '.join(sorted(names))})"
    for tuning in provenance.get("finetunings", []):
        epochs = [row["epoch"] for row in tuning["history"]]
        if epochs != list(range(len(epochs))) or tuning["best"] not in epochs:
            yield f"a history of epochs {epochs[:3]}... of which {tuning['best']} is the best"


def _object(*, optional: tuple[str, ...] = (), others: Any = False, **known: Schema) -> Schema:
    """An object of ``known`` fields, all but the ``optional`` ones required, and ``others``."""
    required = [name for name in known if name not in optional]
    return {
        "type": "object", "properties": known, "required": required, "additionalProperties": others,
    }  # fmt: skip


def _named(of: Schema) -> Schema:
    return {"type": "object", "additionalProperties": of}


def _list(of: Schema, **limits: int) -> Schema:
    return {"type": "array", "items": of, **limits}


def _number(least: float, most: float, **others: Any) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most, **others}


def _or_null(*of: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, *of]}


def _settings(hint: Any) -> Schema:
    """The type of a setting of a configuration, or of a whole one."""
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {field.name: _settings(hints[field.name]) for field in fields(hint)}
        return _object(optional=("dense_tokens",), **known)  # younger than the format
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return _list(_settings(get_args(hint)[0]))
    return {"anyOf": [_settings(each) for each in get_args(hint)]}


TRUTH, TEXT = {"type": "boolean"}, {"type": "string"}
NAME = {"type": "string", "minLength": 1, "maxLength": 1000}
NAMES = _or_null(NAME, _list(NAME))
COUNT = {"type": "integer", "minimum": 0, "maximum": 10**9}
RANK = {"type": "integer", "minimum": 0, "maximum": 10**5}
SEED = {"type": "integer", "minimum": 0, "maximum": LAST_SEED}
SIDE = {"type": "integer", "minimum": 1, "maximum": 10**5}  # channels or pixels
NUMBER = _number(-1e300, 1e300)
SHARE = _number(0, 1 + 1e-4)
SIZES = _list(COUNT, maxItems=10**4)
ANSWERS = _list(NUMBER, maxItems=1000)
KINDS = _list({"enum": list(TOKEN_KINDS)})
SETTING = {"type": ["null", "boolean", "number", "string"]}
DTYPE = {"enum": ["float32", "float64", "float16", "bfloat16"]}

PLAIN = {"$ref": "#/definitions/plain"}
ROUTER = {"$ref": "#/definitions/router"}
DEFINITIONS = {
    "plain": {
        "minimum": -(10**5), "maximum": 10**5, "maxLength": 1000, "maxItems": 1000, "items": PLAIN,
        "additionalProperties": PLAIN,
    },
    "router": {
        "anyOf": [
            _object(kind={"enum": ["cosine", "nearest", "constant"]}),
            _object(kind={"enum": ["token_kinds"]}, prefix=SIZES, tokens=COUNT, inner=ROUTER),
        ]
    },
}  # fmt: skip

LOADING = (
    "cache_dir", "checkpoint_path", "classes", "model_name", "name", "pretrained",
    "pretrained_cfg", "pretrained_cfg_overlay", "weights",
)  # fmt: skip
"""Arguments by which timm would load other files, which no run has."""

ARGUMENTS = _object(
    optional=("num_classes", *LOADING),
    others=PLAIN,
    num_classes=COUNT,
    **{name: {"not": {}} for name in LOADING},
)
INPUT = _object(
    optional=(
        "input_size", "fixed_input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode",
        "num_classes", "label_names", "classifier", "first_conv",
    ),
    others=PLAIN,
    architecture=NAME,
    input_size=_or_null(_list(SIDE, minItems=3, maxItems=3)),
    fixed_input_size=_or_null(TRUTH),
    mean=_or_null(_list(_number(-1e3, 1e3), minItems=1, maxItems=4096)),
    std=_or_null(_list(_number(0, 1e3, exclusiveMinimum=True), minItems=1, maxItems=4096)),
    interpolation=_or_null(
        {"enum": ["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"]}
    ),
    crop_pct=_or_null(_number(0, 10, exclusiveMinimum=True)),
    crop_mode=_or_null({"enum": ["center", "squash", "border"]}),
    num_classes=_or_null(COUNT),
    label_names=_or_null(_list(TEXT)),
    classifier=NAMES,
    first_conv=NAMES,
)  # fmt: skip
REPORT = _object(
    optional=("dense_tokens",),
    index=COUNT,
    name=NAME,
    hidden=COUNT,
    converted=TRUTH,
    reason=TEXT,
    experts=COUNT,
    noise_share=SHARE,
    route_agreement=SHARE,
    active_fraction=SHARE,
    union_fraction=SHARE,
    sizes=SIZES,
    thin=TRUTH,
    dense_tokens=KINDS,
)
EPOCH = _object(epoch=COUNT, steps=COUNT, loss=_or_null(NUMBER), kl=NUMBER, agreement=SHARE)
FINETUNING = _object(
    optional=("contents",),
    key=NAME,
    config=_object(others=SETTING, epochs=COUNT, learning_rate=NUMBER, batch_size=COUNT),
    images=TEXT,
    n_images=COUNT,
    n_held_out=COUNT,
    images_sha256=NAME,
    contents=_list(NAME),
    best=COUNT,
    stopped=TEXT,
    history=_list(EPOCH, minItems=1),
)


def _model(later: tuple[str, ...]) -> Schema:
    """What rebuilds the network; fields that came ``later`` may be missing."""
    return _object(
        optional=("num_classes", *later),
        architecture=NAME,
        arguments=ARGUMENTS,
        num_classes=_or_null(COUNT),
        dtype=DTYPE,
        pretrained_cfg=INPUT,
        routers=_named(ROUTER),
        attentions=_named(_object(scores=RANK, values=RANK, queries=_or_null(COUNT), bias=TRUTH)),
        answers=ANSWERS,
        by_hand=_or_null(TEXT),
    )


def _provenance(later: tuple[str, ...]) -> Schema:
    """What the run was made from, and more that may be told of it."""
    return _object(
        optional=("dtype", "contents", "finetunings", *later),
        others=True,
        model=NAME,
        arguments=ARGUMENTS,
        dtype=DTYPE,
        weights_file=_or_null(NAME),
        weights_sha256=NAME,
        transform_sha256=NAME,
        answers=ANSWERS,
        images=TEXT,
        n_images=COUNT,
        images_sha256=NAME,
        contents=_list(NAME),
        seed=SEED,
        versions=_named(TEXT),
        finetunings=_list(FINETUNING, minItems=1),
    )


@cache
def _validator(run_format: int) -> Callable[[Any], Any]:
    later = LATER if run_format == FIRST else ()
    schema = _object(
        kind=NAME,
        format=COUNT,
        model=_model(later),
        tensors_sha256=NAME,
        config=_settings(ExtractConfig),
        variance_kept=_or_null(_number(0, 1, exclusiveMinimum=True)),
        layers=_list(REPORT, minItems=1),
        provenance=_provenance(later),
        checksum=NAME,
    )
    draft = "http://json-schema.org/draft-04/schema#"  # to the later ones 1.0 is an integer
    return fastjsonschema.compile(schema | {"$schema": draft, "definitions": DEFINITIONS})
