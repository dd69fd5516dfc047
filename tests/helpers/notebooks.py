"""Tiny notebooks for the tests of the report."""

from pathlib import Path

import nbformat

PARAMETERS = """number: int = 1  # a whole number
share: float = 0.5  # a fraction
name: str = "a"  # a text
folder: str = None  # a text or nothing
layers: list = []  # a list
preset: str = "small"  # set by the report
out: str = None  # set by the report"""

KERNELSPEC = {"name": "python3", "display_name": "Python 3", "language": "python"}


def write_notebook(path: Path, *cells: str, parameters: str = PARAMETERS) -> Path:
    """A notebook of a title, the parameters cell and ``cells``.

    ``md:`` starts Markdown, ``solution:`` the code of an exercise's solution.
    """
    notebook = nbformat.v4.new_notebook(metadata={"kernelspec": KERNELSPEC})
    notebook.cells = [
        nbformat.v4.new_markdown_cell(f"# The {path.stem} notebook\n\nWhat **it** shows."),
        nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}),
        *(_cell(source) for source in cells),
    ]
    nbformat.write(notebook, path)
    return path


def _cell(source: str) -> nbformat.NotebookNode:
    if source.startswith("md:"):
        return nbformat.v4.new_markdown_cell(source.removeprefix("md:"))
    tags = {"tags": ["solution"]} if source.startswith("solution:") else {}
    return nbformat.v4.new_code_cell(source.removeprefix("solution:"), metadata=tags)
