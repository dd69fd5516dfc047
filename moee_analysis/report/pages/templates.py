"""HTML pages from the templates beside them: escaped, and fetching nothing."""

import base64
import os
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader

from moee_analysis.outside_text import printable
from moee_analysis.report.notebook.results import readable

PAGES = Environment(
    loader=PackageLoader("moee_analysis", "report"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
PAGES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
PAGES.filters |= {
    "readable": readable,
    "printable": lambda value: printable(str(value)),
    "address": lambda path: quote(os.fsencode(path)),  # of a file, whatever it is called
}


def render(name: str, **facts: Any) -> str:
    """Fill the template ``name``, a path below this room, with ``facts``."""
    return PAGES.get_template(name).render(facts)


def data_uri(picture: bytes, kind: str = "png") -> str:
    """``picture`` as an address that carries it."""
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"
