"""Which notebooks a report runs, and what they are told, which is checked strictly.

Papermill itself lets a typo pass with a log line.
"""

import ast
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.utils.environment import own_folder
from moee_analysis.utils.storage.files import check_file

TYPES = {"str": str, "int": int, "float": (int, float), "bool": bool, "list": list, "dict": dict}
OWN = ("out", "preset")  # parameters that the report sets by itself in every notebook


def own_notebooks() -> list[Path]:
    """The project's notebooks."""
    return sorted(own_folder("notebooks").glob("*.ipynb"))


def notebooks_named(text: str) -> list[Path]:
    """The project's notebooks by numbers, names, or beginnings of names, as ``01,03,riv``."""
    return sorted({_notebook_named(part.strip()) for part in text.split(",")})


def _notebook_named(name: str) -> Path:
    every = {path.stem: path for path in own_notebooks()}
    if name in every:
        meant = [name]
    elif name.isascii() and name.isdigit():
        number = name.lstrip("0")
        meant = [stem for stem in every if stem.partition("_")[0].lstrip("0") == number]
    else:
        names = {stem: (stem, stem.partition("_")[2]) for stem in every}
        meant = [stem for stem in every if name and any(n.startswith(name) for n in names[stem])]
    if len(meant) == 1:
        return every[meant[0]]
    several = f", which may be {', '.join(meant)}" if meant else ""
    expected, found = f"notebooks among {', '.join(every)}", f"{name!r}{several}"
    raise MoeeError(expected, found, "name each by its number")


def read_setting(text: str) -> tuple[str, Any]:
    """A parameter and its value, as ``layers=[2,6]``; what is no JSON is a text."""
    name, sign, value = text.partition("=")
    if not sign or not name.isidentifier():
        hint = "as in layers=[2,6] or classes='[\"pug\"]'"
        raise MoeeError("NAME=VALUE, the parameter of a notebook and its value", repr(text), hint)
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def check_paths(notebooks: Sequence[str | Path] | None) -> list[Path]:
    """Absolute paths of the notebooks to run, or all of the project's; each has its own name."""
    chosen = []
    for path in own_notebooks() if notebooks is None else notebooks:
        try:
            chosen.append(Path(path).resolve())
            str(chosen[-1]).encode()  # papermill and pages take names in UTF-8 alone
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            found, hint = f"{str(path)!r} ({error})", "rename it or its folder"
            raise MoeeError("the path of a notebook, in UTF-8", found, hint) from None
    if not chosen:
        raise MoeeError("at least one notebook", "none", "name the notebooks to run")
    ((stem, count),) = Counter(path.stem for path in chosen).most_common(1)
    if count > 1:
        raise MoeeError("notebooks with different names", f"'{stem}' twice", "rename one")
    return chosen


def check_parameters(notebook: Path, given: Mapping[str, Any]) -> None:
    """Refuse parameters ``given`` that ``notebook`` cannot take, or that it lacks itself."""
    declared = declared_parameters(notebook)
    for name in OWN:
        if name in given:
            expected = f"'{name}' as an argument of the report"
            raise MoeeError(expected, "a notebook parameter", "move it there")
        if name not in declared:
            expected = f"a parameter '{name}' in {notebook.name}"
            raise MoeeError(expected, "none", f"declare '{name}: str'")
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
    from papermill.translators import PythonTranslator

    source = _parameters_source(notebook)
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        expected = f"Python in the parameters cell of {notebook.name}"
        raise MoeeError(expected, str(error), "correct the cell") from None
    declared = {each.name: each._asdict() for each in PythonTranslator.inspect({"source": source})}
    assigned = [s for s in statements if isinstance(s, (ast.Assign, ast.AnnAssign))]
    targets = [t for s in assigned for t in getattr(s, "targets", None) or [s.target]]
    hidden = sorted({t.id for t in targets if isinstance(t, ast.Name)} - declared.keys())
    if hidden:
        expected = f"lines 'name: type = literal' in the parameters cell of {notebook.name}"
        found = f"{', '.join(hidden)} written otherwise, unseen by papermill"
        hint = f"use one of the types {', '.join(TYPES)}, and a single '=' on the line"
        raise MoeeError(expected, found, hint)
    return declared


def _parameters_source(notebook: Path) -> str:
    import nbformat

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
