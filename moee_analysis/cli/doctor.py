"""``moee doctor``: what works on this machine, what is missing, and what to do about it."""

import json
import os
import platform
import shutil
import sys
import tempfile
import textwrap
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import joblib
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import moee_analysis as moee
from moee_analysis.errors import MoeeError
from moee_analysis.models.exporting import EXTRA
from moee_analysis.report.runner.choose import own_notebooks
from moee_analysis.utils import environment
from moee_analysis.utils.storage.refusals import check_place, size_of

WIDTH = 88  # letters of a line
SCENES, RIGHT = 60, 0.75  # bundled scenes, and the share that the bundled model must name
LITTLE_MEMORY, LITTLE_DISK = 2e9, 5e9


@dataclass(frozen=True)
class Check:
    """One part of the machine: what was ``found``, and what to do where it is not ``ok``."""

    name: str
    found: str
    ok: bool = True
    advice: str = ""
    required: bool = True

    def __str__(self) -> str:
        mark = "✓" if self.ok else "✗" if self.required else "·"
        line = f"{mark} {self.name:20} {self.found}"
        return line if self.ok else f"{line}\n  {'':20} {self.advice}"


def doctor(arguments: Namespace) -> int:
    """Say what works here; the exit code says whether all that is required does."""
    names = ("weights", "classes", "img_size", "in_chans")
    diagnosis = examine(arguments.model, **{name: getattr(arguments, name) for name in names})
    plain = diagnosis | {"checks": list(map(asdict, diagnosis["checks"]))}
    print(json.dumps(plain, indent=2) if arguments.json else as_text(diagnosis))
    return 0 if diagnosis["ok"] else 1


def examine(model: str = "bundled", **arguments: Any) -> dict[str, Any]:
    """Return ``ok``, ``versions``, ``machine`` and ``checks`` of this machine.

    A ``model`` other than the bundled one, with ``arguments`` of ``load_model``, is looked at too.
    """
    total, free = environment.memory()
    about = {
        "python": sys.executable, "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "cores": joblib.cpu_count(), "threads": torch.get_num_threads(),
        "memory": total, "memory_free": free,
        "cuda": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
    }  # fmt: skip
    checks = [*_software(), *_parts(about), *_places(), _bundled_model()]
    if model != "bundled" or arguments.get("weights"):
        mlps = moee.find_mlps(moee.load_model(model, **arguments))
        checks.append(Check(model, f"{len(mlps)} of its MLPs can be taken apart"))
    ok = all(check.ok for check in checks if check.required)
    return {"ok": ok, "versions": environment.versions(), "machine": about, "checks": checks}


def as_text(diagnosis: dict[str, Any]) -> str:
    """All that was found, for a person to read."""
    found = ", ".join(map(" ".join, diagnosis["versions"].items()))
    about = "{python} on {system} ({processor})".format(**diagnosis["machine"])
    broken = [check.name for check in diagnosis["checks"] if check.required and not check.ok]
    verdict = f"Does not work: {', '.join(broken)}. What to do stands below each."
    lines = [*textwrap.wrap(found, WIDTH), about, "", *diagnosis["checks"], ""]
    return "\n".join(map(str, [*lines, verdict if broken else "All required parts work."]))


def _software() -> Iterator[Check]:
    """Python and every library, against what the package asks for."""
    try:
        wanted = metadata.metadata(environment.PACKAGE)["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Check("package", "not installed", ok=False, advice="pip install -e . in the checkout")
        return
    here, advice = platform.python_version(), f"set the environment up with Python {wanted}"
    yield Check("Python", here, here in SpecifierSet(wanted), advice)
    asked = [Requirement(text) for text in metadata.requires(environment.PACKAGE) or ()]
    needed = [r for r in asked if not r.marker or r.marker.evaluate({"extra": ""})]
    there = {each.name: environment.version(each.name) for each in needed}
    wrong = [
        f"{each.name}{each.specifier}: {there[each.name]}"
        for each in needed
        if not each.specifier.contains(there[each.name], prereleases=True)
    ]
    found = "; ".join(wrong) or f"all {len(needed)} as asked for"
    yield Check("libraries", found, not wrong, "make setup, or pip install moee-analysis")


def _parts(about: dict[str, Any]) -> Iterator[Check]:
    """Cores and memory, and parts that something gains by and nothing else needs."""
    yield Check("cores", f"{about['cores']} usable, {about['threads']} threads in torch")
    free, advice = about["memory_free"], "close other programs, or take --preset smoke"
    found = f"{free / 1e9:.1f} of {about['memory'] / 1e9:.1f} GB free"
    yield Check("memory", found, free > LITTLE_MEMORY, advice, required=False)
    there = {name: name for name in filter(find_spec, ("pymetis", "jupyterlab", "onnxruntime"))}
    for name, found, advice in (
        ("CUDA", ", ".join(about["cuda"]), "everything runs on the CPU"),
        ("METIS", there.get("pymetis"), "pip install pymetis; else eigenvectors divide graphs"),
        ("JupyterLab", there.get("jupyterlab"), "pip install jupyterlab, for moee lab"),
        ("ONNX Runtime", there.get("onnxruntime"), f"pip install '{EXTRA}', for moee export"),
    ):
        yield Check(name, found or "none", bool(found), advice, required=False)


def _places() -> Iterator[Check]:
    """The project's notebooks, and folders that libraries and the store write to."""
    elsewhere = "set {} to a folder that can be written to".format
    for name, look, advice in (
        ("notebooks", lambda: str(len(own_notebooks())), ""),
        ("temporary files", _temporary, elsewhere("TMPDIR")),
        ("numba's cache", environment.check_numba_cache, ""),
        ("store", _store, elsewhere("MOEE_STORE")),
        ("disk", _disk, "make room, or set MOEE_STORE to another disk"),
    ):
        try:
            yield Check(name, look())
        except (MoeeError, OSError) as error:
            found, hint = getattr(error, "found", str(error)), getattr(error, "hint", "")
            yield Check(name, found, ok=False, advice=advice or hint, required=name != "disk")


def _temporary() -> str:
    with tempfile.TemporaryFile():
        return tempfile.gettempdir()


def _store() -> str:
    folder = environment.store_folder()
    check_place(folder / "trial")
    return f"{folder}: {size_of(folder) / 1e9:.2f} GB"


def _disk() -> str:
    free = shutil.disk_usage(environment.nearest_folder(environment.store_folder())).free
    if free < LITTLE_DISK:
        raise OSError(f"{free / 1e9:.1f} GB free there")
    return f"{free / 1e9:.1f} GB free there"


def _bundled_model() -> Check:
    """Whether the bundled model predicts what it should."""
    try:
        model, scenes = moee.load_model(), moee.load_images(limit=SCENES)
    except MoeeError as error:
        return Check("bundled model", str(error), ok=False, advice="install the project again")
    with torch.inference_mode():
        found = torch.cat([model(batch).argmax(dim=1) for batch in scenes.batches(model)])
    share = float((found.numpy() == scenes.labels(model)).mean())
    advice = f"it should name {RIGHT:.0%} or more: install the project again, or another torch"
    text = f"names {share:.0%} of {SCENES} scenes it has never seen"
    return Check("bundled model", text, share >= RIGHT, advice)
