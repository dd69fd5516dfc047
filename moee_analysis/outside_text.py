"""Text from outside, such as the name of a folder, shown as it is and taken for nothing else."""

import re

UNSEEN = re.compile(
    "[\x00-\x1f\x7f-\x9f"  # control characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # what turns the direction of writing
    "\u2028\u2029"  # ends of lines and paragraphs
    "\ud800-\udfff]"  # bytes of a name that is not in UTF-8
)
MARKUP = re.compile(
    r"[\\`*\[\]<>#|~$&@]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # but not within a word
    r"|:(?=//)|(?<=[wW]{3})\."  # addresses
    r"|^[-+\s]|^\d(?=\d*[.)](?:\s|$))"  # lists, and code that is set in
)
MATH = "$\\"


def printable(text: str) -> str:
    r"""Write what acts on a terminal or on the text around as an escape: ``\x1b``, ``\u202e``."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def as_markdown(text: str) -> str:
    """Markdown, also of a cell of a table, that shows ``text`` literally."""
    return MARKUP.sub(_entity, printable(text))


def _entity(found: re.Match[str]) -> str:
    entity = f"&#{ord(found[0])};"
    # JupyterLab looks for formulas in the finished page; no formula goes on in another element
    return f"<span>{entity}</span>" if found[0] in MATH else entity
