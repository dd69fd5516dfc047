"""Strict parameters for notebooks: papermill itself lets a typo pass with a log line."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from pathlib import Path
from textwrap import shorten
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import check_file

TYPES = {"str": str, "int": int, "float": float, "bool": bool, "list": list, "dict": dict}
OWN = ("out", "preset")
"""Parameters that the report sets by itself in every notebook."""


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> None:
    """Check that ``notebook`` can take the parameters ``given``, and the report's own.

    Raises
    ------
    MoeeError
        No such notebook; a parameters cell papermill cannot read completely; an unknown
        parameter; a value of another type than the notebook declares.
    """
    declared = declared_parameters(notebook)
    for name in OWN:
        if name not in declared:
            raise MoeeError(
                f"a parameter '{name}' in {notebook.name}", "none", f"declare '{name}: str'"
            )
    for name, value in given.items():
        if name not in declared:
            raise MoeeError(
                f"parameters among {', '.join(declared)} for {notebook.name}",
                f"'{name}'",
                "correct its spelling",
            )
        _check_value(name, value, declared[name], notebook)


def declared_parameters(notebook: Path) -> dict[str, dict[str, Any]]:
    """What papermill reads in the parameters cell: by name, each with its type and default.

    Raises
    ------
    MoeeError
        The notebook is missing or foreign, has not exactly one parameters cell, or that cell
        assigns a name papermill cannot see (a union annotation, a second ``=``).
    """
    from papermill.translators import PythonTranslator

    source = _parameters_source(notebook)
    declared = {each.name: each._asdict() for each in PythonTranslator.inspect({"source": source})}
    hidden = sorted(_assigned(source, notebook) - declared.keys())
    if hidden:
        raise MoeeError(
            f"lines 'name: type = literal' in the parameters cell of {notebook.name}",
            f"{', '.join(hidden)} written otherwise, unseen by papermill",
            f"use one of the types {', '.join(TYPES)}, and a single '=' on the line",
        )
    return declared


def literal(path: Path) -> str:
    """``path`` for papermill, which takes braces for the fields of a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _parameters_source(notebook: Path) -> str:
    import nbformat

    check_file(notebook, expected="a notebook")
    try:
        read = nbformat.read(notebook, as_version=4)
        nbformat.validate(read)  # the reader only logs what is wrong
    except Exception as error:  # a foreign file breaks the reader in many ways
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        found = shorten(told, 160, placeholder=" ...")
        raise MoeeError(f"a notebook at '{notebook}'", found, "check the file") from None
    tagged = [c.source for c in read.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise MoeeError(
            f"one cell with the tag 'parameters' in {notebook.name}",
            str(len(tagged)),
            "give the tag to the cell with the parameters, and to no other",
        )
    return tagged[0]


def _assigned(source: str, notebook: Path) -> set[str]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise MoeeError(
            f"Python in the parameters cell of {notebook.name}", str(error), "correct the cell"
        ) from None
    targets = [s.target for s in statements if isinstance(s, ast.AnnAssign)]
    targets += [t for s in statements if isinstance(s, ast.Assign) for t in s.targets]
    return {t.id for t in targets if isinstance(t, ast.Name)}


def _check_value(name: str, value: Any, declared: Mapping[str, Any], notebook: Path) -> None:
    expected = declared["inferred_type_name"]
    if value is None and declared["default"] == "None":
        return
    if _is_json(value) and _fits(value, expected):
        return
    raise MoeeError(
        f"'{name}' to be {expected if expected in TYPES else 'a JSON value'} in {notebook.name}",
        f"{value!r} ({type(value).__name__})",
        "pass a value of that type",
    )


def _fits(value: Any, expected: str) -> bool:
    if isinstance(value, bool):
        return expected in ("bool", "None")
    if expected == "float":
        return isinstance(value, (int, float))
    return isinstance(value, TYPES.get(expected, object))


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_json(item) for k, item in value.items())
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, (str, int))
