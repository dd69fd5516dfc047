"""Which notebooks a report runs, and what they are told, as the command line names it."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moee_analysis.errors import MoeeError
from moee_analysis.utils.environment import own_folder


def own_notebooks() -> list[Path]:
    """The project's notebooks."""
    return sorted(own_folder("notebooks").glob("*.ipynb"))


def notebooks_named(text: str) -> list[Path]:
    """The project's notebooks by numbers, names, or beginnings of names, as ``01,03,riv``."""
    found = [notebook_named(part.strip()) for part in text.split(",")]
    return sorted(set(found))


def notebook_named(name: str) -> Path:
    """The one notebook of the project that is meant by its number, name or a beginning of it."""
    every = own_notebooks()
    if name.isascii() and name.isdigit():
        meant = [
            path for path in every if path.stem.partition("_")[0].lstrip("0") == name.lstrip("0")
        ]
    else:
        names = {path: (path.stem, path.stem.partition("_")[2]) for path in every}
        meant = [path for path in every if name and any(n.startswith(name) for n in names[path])]
        meant = [path for path in meant if path.stem == name] or meant
    if len(meant) == 1:
        return meant[0]
    several = f"{name!r}, which may be {', '.join(path.stem for path in meant)}"
    found = several if meant else repr(name)
    listed = ", ".join(path.stem for path in every)
    raise MoeeError(f"notebooks among {listed}", found, "name each by its number")


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
    if notebooks is None:
        return [path.resolve() for path in own_notebooks()]
    chosen = []
    for path in notebooks:
        try:
            chosen.append(Path(path).resolve())
            str(chosen[-1]).encode()  # papermill and pages take names in UTF-8 alone
        except (OSError, RuntimeError, TypeError, ValueError) as error:
            found, hint = f"{str(path)!r} ({error})", "rename it or its folder"
            raise MoeeError("the path of a notebook, in UTF-8", found, hint) from None
    if not chosen:
        raise MoeeError("at least one notebook", "none", "name the notebooks to run")
    twice = [stem for stem, count in Counter(path.stem for path in chosen).items() if count > 1]
    if twice:
        raise MoeeError("notebooks with different names", f"'{twice[0]}' twice", "rename one")
    return chosen
