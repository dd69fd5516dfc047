"""The law of the house, as CONTRIBUTING.md has it: who imports whom, how large things are."""

import ast
import re
from graphlib import TopologicalSorter
from urllib.parse import unquote

import pytest

from tests.conftest import ROOT

PACKAGE = ROOT / "moee_analysis"
FILES = {path.relative_to(ROOT): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {place: ast.parse(path.read_text(encoding="utf-8")) for place, path in FILES.items()}
FACE = (PACKAGE / "__init__.py").relative_to(ROOT)
ROOMS = re.findall(r"^\| `(\w+)/` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)
FREE = {"errors.py", "outside_text.py", "__init__.py", "__main__.py"}
"""Files at the root: the error and the public face."""


def _place(name):
    """The file of a module; None for the modules of others and for names inside a module."""
    base = ROOT.joinpath(*name.split("."))
    found = (base.with_suffix(".py"), base / "__init__.py")
    return next((f.relative_to(ROOT) for f in found if f.is_file()), None)


def _imported(place):
    """The files of the package that one imports, for types and inside functions too."""
    for node in ast.walk(TREES[place]):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{place}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if _place(name) else node.module for name in names]
        else:
            continue
        yield from (_place(name) for name in names if name.startswith("moee_analysis"))


GRAPH = {place: set(_imported(place)) - {place} for place in FILES if place != FACE}


def _room(place):
    return place.parts[1]


def test_every_room_stands_in_the_list_once():
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    assert sorted(ROOMS) == sorted(folders)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_above_it_in_the_list(room):
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *FREE - {"__init__.py"}}
    if room == "cli":
        allowed.add("__init__.py")
    own = [place for place in GRAPH if _room(place) == room]
    wrong = {(str(a), str(b)) for a in own for b in GRAPH[a] if _room(b) not in allowed}
    assert not wrong


def test_plots_know_tables_alone():
    rooms = {_room(b) for a in GRAPH if _room(a) == "plots" for b in GRAPH[a]}
    assert rooms <= {"plots", "utils", *FREE}


def test_no_file_is_in_a_circle():
    TopologicalSorter(GRAPH).prepare()


def _sub_room(place):
    """The folder of a file inside a room; a file at a room's front stands for itself."""
    return place if len(place.parts) <= 3 else place.parent


def test_no_folder_is_in_a_circle():
    folders = {}
    for place, imported in GRAPH.items():
        if place.name != "__init__.py":
            others = {_sub_room(b) for b in imported if b.name != "__init__.py"}
            folders.setdefault(_sub_room(place), set()).update(others - {_sub_room(place)})
    TopologicalSorter(folders).prepare()


def test_rooms_are_two_levels_deep_and_none_is_crowded():
    folders = {}
    for place in FILES:
        folders.setdefault(place.parent, []).append(place.name)
    assert max(len(folder.parts) for folder in folders) <= 3
    crowded = {str(f): len(names) for f, names in folders.items() if len(set(names) - FREE) > 15}
    assert not crowded


def test_files_that_pages_name_or_link_are_there():
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    places = [
        f"/{path.relative_to(ROOT)}" for path in ROOT.rglob("*.py") if ".venv" not in path.parts
    ]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        named = re.findall(r"`([\w/.]+\.py)`", text) if page.name != "CHANGELOG.md" else []
        lost = [name for name in named if not any(place.endswith(f"/{name}") for place in places)]
        links = re.findall(r"\]\(((?!\w+:)[^)#\s]+)", text)
        lost += [link for link in links if not (page.parent / unquote(link)).exists()]
        assert not lost, page.name


def test_files_and_functions_are_short():
    files = {str(p) for p, path in FILES.items() if len(path.read_text().splitlines()) > 350}
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    functions = {
        f"{place}: {node.name}"
        for place, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, kinds) and _body(node) > 40
    }
    assert not files | functions


def _body(function):
    """Lines of a function without its signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0
