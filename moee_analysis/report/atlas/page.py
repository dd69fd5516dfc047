"""The page of the atlas: facts, style and script in one file that fetches nothing."""

import base64
import hashlib
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import nn

from moee_analysis import measure
from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.run import Extraction
from moee_analysis.report.atlas.facts import (
    Seen,
    image_facts,
    layer_facts,
    look_through,
    packed_routes,
)
from moee_analysis.report.pages.site import render
from moee_analysis.utils.environment import version
from moee_analysis.utils.storage.files import write_text
from moee_analysis.utils.storage.refusals import check_place

SCRIPTS = ("atlas_state.js", "atlas_expert.js", "atlas_image.js")
HERE = Path(__file__).parent


def write_atlas(
    run: Extraction, images: ImageSet, out: str | Path, *, dense: nn.Module | None = None
) -> Path:
    """Write the atlas of a run as one HTML file, which needs no server and no network.

    It shows every layer with one expert per token whose patches have places in the image. All that
    it says but the neurons of experts is measured on ``images``; their folders are the classes,
    whatever their names. Without the ``dense`` model it tells no predictions of it and no savings.
    """
    out = Path(out)
    check_place(out)
    write_text(out, page(atlas_facts(run, images, dense=dense)))
    return out


def atlas_facts(
    run: Extraction, images: ImageSet, *, dense: nn.Module | None = None
) -> dict[str, Any]:
    """Return all that the page shows, in JSON's types.

    ``layers`` (see ``layer_facts``), each with ``routes``; ``images`` (class, picture,
    predictions); ``about``, names and values; ``absent``, the layers not shown, and why.
    """
    seen = look_through(run, images)
    layers = [each | {"routes": packed_routes(seen, each["layer"])} for each in layer_facts(seen)]
    return {
        "about": _about(seen, dense, layers),
        "absent": _absent(seen),
        "layers": layers,
        "images": image_facts(seen, dense),
    }


def page(facts: dict[str, Any]) -> str:
    """Return the HTML of ``facts``.

    The browser runs the page's own script and nothing else, even if a name were taken for markup:
    the content security policy lists the hashes of script and style.
    """
    style = _file("atlas.css")
    script = '"use strict";\n' + "\n".join(map(_file, SCRIPTS))
    return render(
        "atlas/atlas.html",
        about=facts["about"],
        absent=facts["absent"],
        facts={"layers": facts["layers"], "images": facts["images"]},
        style=style,
        script=script,
        hashes={"style": _hash(style), "script": _hash(script)},
    )


def _file(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
    return f"'sha256-{digest}'"


def _about(
    seen: Seen, dense: nn.Module | None, layers: list[dict[str, Any]]
) -> list[tuple[str, str]]:
    run, experts = seen.run, sum(len(layer["experts"]) for layer in layers)
    return [
        ("Model", str(run.provenance["model"])),
        ("Recipe", f"{run.config.recipe}, seed {run.config.seed}"),
        ("Experts", f"{experts} in {len(layers)} of {len(run.layers)} layers"),
        ("Images", f"{len(seen.images)} of {seen.images.name}"),
        *_savings(seen, dense),
        ("Made", f"{datetime.now().astimezone():%Y-%m-%d}, moee-analysis {version()}"),
    ]


def _absent(seen: Seen) -> str:
    reasons = [
        f"layer {report.index} "
        + ("has no patches with places" if report.converted else f"stayed dense: {report.reason}")
        for report in seen.run.layers
        if report.index not in seen.routed.placed
    ]
    return f"Not shown: {'; '.join(reasons)}." if reasons else ""


def _savings(seen: Seen, dense: nn.Module | None) -> list[tuple[str, str]]:
    if dense is None:
        return []
    costs = measure.macs(replace(seen.run, original=dense), routes=seen.routed)
    total = costs.set_index("component").loc["total"]
    macs, parameters = (total[kind] / total[f"{kind}_dense"] - 1 for kind in ("macs", "params"))
    return [
        ("MACs", f"{macs:+.1%} of the dense model's".replace("-", "−")),
        ("Stored parameters", f"{parameters:+.1%}".replace("-", "−")),
    ]
