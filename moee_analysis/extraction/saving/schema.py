"""The facts of a run: every field of ``run.json``, its type and its range.

No other fields are taken, but among the arguments of a network and in the record of its origin.
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
from moee_analysis.extraction.config.clustering import ClusterConfig
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.saving.layer_report import LayerReport
from moee_analysis.utils.checks import LAST_SEED

Schema = dict[str, Any]

HINT = "restore the file, or extract again"
FIRST = 5
"""The format whose models have neither answers nor arguments of ``timm.create_model``."""

LATER = ("arguments", "dtype", "answers", "by_hand", "transform_sha256")
REMOVED = {
    ExtractConfig: {"dense_tokens", "union", "thin"},
    ClusterConfig: {"selection", "metric"},
    LayerReport: {"dense_tokens", "thin"},
}
"""Fields of earlier versions, without which a run is loaded as well."""


def without_removed(facts: dict[str, Any]) -> dict[str, Any]:
    """Leave out :data:`REMOVED` fields of a run of an earlier version.

    Raises
    ------
    MoeeError
        A run of a kind that is no more.
    """

    def trimmed(kind: type, content: Any) -> Any:
        if not isinstance(content, dict):
            return content
        gone = REMOVED[kind] - {field.name for field in fields(kind)}
        return {name: value for name, value in content.items() if name not in gone}

    config, layers = trimmed(ExtractConfig, facts.get("config")), facts.get("layers")
    if isinstance(config, dict) and "clustering" in config:
        config["clustering"] = trimmed(ClusterConfig, config["clustering"])
        if config.get("refit") == "each":
            raise MoeeError(
                "a run whose experts share one W2", 'refit="each", a W2 for each expert',
                'extract again with refit="shared", or load it with the version that saved it',
            )  # fmt: skip
    if isinstance(layers, list):
        layers = [trimmed(LayerReport, layer) for layer in layers]
    changed = {"config": config, "layers": layers}
    return facts | {name: value for name, value in changed.items() if name in facts}


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


def _integer(least: int, most: int) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most}


def _or_null(*of: Schema) -> Schema:
    return {"anyOf": [{"type": "null"}, *of]}


TRUTH, TEXT, NULL = ({"type": name} for name in ("boolean", "string", "null"))
NAME = {"type": "string", "minLength": 1, "maxLength": 1000}
NAMES = _or_null(NAME, _list(NAME))
COUNT = _integer(0, 10**9)
RANK = _integer(0, 10**5)
SIDE = _integer(1, 10**5)  # channels or pixels
NUMBER = _number(-1e300, 1e300)
SHARE = _number(0, 1 + 1e-4)
ANSWERS = _list(NUMBER, maxItems=1000)
SETTING = {"type": ["null", "boolean", "number", "string"]}
DTYPE = {"enum": ["float32", "float64", "float16", "bfloat16"]}


def _of_dataclass(hint: Any, **kinds: Schema) -> Schema:
    """The type of a dataclass or of a field; ``kinds`` are those of numbers, by Python's name."""
    simple = {str: TEXT, bool: TRUTH, NoneType: NULL}
    if hint in (int, float):
        return kinds[hint.__name__]
    if hint in simple:
        return simple[hint]
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        known = {field.name: _of_dataclass(hints[field.name], **kinds) for field in fields(hint)}
        return _object(optional=("dense_tokens",), **known)  # younger than the format
    if get_origin(hint) is Literal:
        return {"enum": list(get_args(hint))}
    if get_origin(hint) is tuple:
        return _list(_of_dataclass(get_args(hint)[0], **kinds), maxItems=10**4)
    return {"anyOf": [_of_dataclass(each, **kinds) for each in get_args(hint)]}


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
            _object(
                kind={"enum": ["token_kinds"]},
                prefix=_list(COUNT, maxItems=10**4),
                tokens=COUNT,
                inner=ROUTER,
            ),
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


@cache
def _validator(run_format: int) -> Callable[[Any], Any]:
    later = LATER if run_format == FIRST else ()
    model = _object(
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
    provenance = _object(
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
        seed=_integer(0, LAST_SEED),
        versions=_named(TEXT),
        finetunings=_list(FINETUNING, minItems=1),
    )
    schema = _object(
        kind=NAME,
        format=COUNT,
        model=model,
        tensors_sha256=NAME,
        config=_of_dataclass(ExtractConfig, int={"type": "integer"}, float={"type": "number"}),
        variance_kept=_or_null(_number(0, 1, exclusiveMinimum=True)),
        layers=_list(_of_dataclass(LayerReport, int=COUNT, float=SHARE), minItems=1),
        provenance=provenance,
        checksum=NAME,
    )
    draft = "http://json-schema.org/draft-04/schema#"  # to the later ones 1.0 is an integer
    return fastjsonschema.compile(schema | {"$schema": draft, "definitions": DEFINITIONS})
