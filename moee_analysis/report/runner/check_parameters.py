"""Strict parameters for notebooks: papermill itself lets a typo pass with a log line."""

import ast
import json
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

import nbformat
from papermill.translators import PythonTranslator

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import check_file

TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
OWN = ("out", "preset")
"""Parameters that the report sets by itself in every notebook."""


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> None:
    """Refuse parameters ``given`` that ``notebook`` cannot take, or that it lacks itself."""
    declared = declared_parameters(notebook)
    for name in OWN:
        if name not in declared:
            hint = f"declare '{name}: str'"
            raise MoeeError(f"a parameter '{name}' in {notebook.name}", "none", hint)
    for name, value in given.items():
        if name not in declared:
            expected = f"parameters among {', '.join(declared)} for {notebook.name}"
            raise MoeeError(expected, f"'{name}'", "correct its spelling")
        kind = declared[name]["inferred_type_name"]
        if not _fits(value, kind, default=declared[name]["default"]):
            shown = kind if kind in TYPES else "a JSON value"
            expected = f"'{name}' to be {shown} in {notebook.name}"
            found = f"{value!r} ({type(value).__name__})"
            raise MoeeError(expected, found, "pass a value of that type")


def declared_parameters(notebook: Path) -> dict[str, dict[str, Any]]:
    """The parameters cell as papermill reads it: by name, each with its type and default.

    A name that papermill cannot see (a union annotation, a second ``=``) is refused.
    """
    source = _parameters_source(notebook)
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        expected = f"Python in the parameters cell of {notebook.name}"
        raise MoeeError(expected, str(error), "correct the cell") from None
    declared = {each.name: each._asdict() for each in PythonTranslator.inspect({"source": source})}
    assignments = [s for s in statements if isinstance(s, (ast.Assign, ast.AnnAssign))]
    targets = [t for s in assignments for t in getattr(s, "targets", None) or [s.target]]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    hidden = sorted(names - declared.keys())
    if hidden:
        raise MoeeError(
            f"lines 'name: type = literal' in the parameters cell of {notebook.name}",
            f"{', '.join(hidden)} written otherwise, unseen by papermill",
            f"use one of the types {', '.join(TYPES)}, and a single '=' on the line",
        )
    return declared


def _parameters_source(notebook: Path) -> str:
    check_file(notebook, expected="a notebook")
    try:
        read = nbformat.read(notebook, as_version=4)
        nbformat.validate(read)  # the reader only logs what is wrong
    except Exception as error:  # a foreign file breaks the reader in many ways
        first = f"{type(error).__name__}: {error}".partition("\n")[0]
        found = shorten(first, 160, placeholder=" ...")
        raise MoeeError(f"a notebook at '{notebook}'", found, "check the file") from None
    tagged = [c.source for c in read.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        hint = "give the tag to the cell with the parameters, and to no other"
        expected = f"one cell with the tag 'parameters' in {notebook.name}"
        raise MoeeError(expected, str(len(tagged)), hint)
    return tagged[0]


def _fits(value: Any, kind: str, *, default: str) -> bool:
    if value is None and default == "None":
        return True
    if isinstance(value, bool):
        return kind in ("bool", "None")
    try:
        is_json = json.loads(json.dumps(value, allow_nan=False)) == value
    except (TypeError, ValueError):
        return False
    return is_json and isinstance(value, TYPES.get(kind, object))
