"""What works on this machine, what is missing, and what to do about it."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from moee_analysis.cli.costs import Costs, costs_of, speed_of
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.models.loading import load_model
from moee_analysis.utils.caches import check_numba_cache
from moee_analysis.utils.paths import notebooks_folder, store_folder
from moee_analysis.utils.versions import PACKAGE, versions

if TYPE_CHECKING:
    from collections.abc import Iterator

SCENES, RIGHT = 60, 0.75  # bundled scenes, and the share that the bundled model must name
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LITTLE_MEMORY, LITTLE_DISK = 2e9, 5e9
CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: what was ``found``, and what to do where it is not ``ok``."""

    name: str
    found: str
    ok: bool = True
    required: bool = True
    advice: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All that was looked at; ``costs`` is None where the model cannot be loaded."""

    versions: dict[str, str]
    machine: dict[str, Any]
    checks: tuple[Check, ...]
    costs: Costs | None

    @property
    def ok(self) -> bool:
        """Whether all required parts work."""
        return all(check.ok for check in self.checks if check.required)


def examined(
    model: str = "bundled",
    *,
    weights: str | Path | None = None,
    images: int | None = None,
    preset: str = "small",
    **arguments: Any,
) -> Diagnosis:
    """Look at this machine, and estimate what a run with ``model`` would cost on it.

    Parameters
    ----------
    images
        How many there are to calibrate on; None: as many as the ``preset`` takes.
    arguments
        Further ones of ``load_model``.

    Raises
    ------
    MoeeError
        A model other than the bundled one that cannot be loaded; no images; an unknown preset.
    """
    checks = [*_software(), *_machine_checks(), *_optional(), *_places(), *_store(), *_bundled()]
    costs = None
    if model != "bundled" or weights or checks[-1].ok:
        loaded = load_model(model, weights=weights, **arguments)
        costs = costs_of(loaded, speed_of(loaded), images=images, preset=preset)
    return Diagnosis(versions(), machine(), tuple(checks), costs)


def machine() -> dict[str, Any]:
    """System, usable cores, bytes of memory and accelerators of this machine."""
    memory = psutil.virtual_memory()
    limits = [int(text) for text in map(_text, CGROUPS) if text.isdigit()]
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    return {
        "python": sys.executable,
        "system": platform.platform(),
        "processor": f"{platform.machine()}, {os.cpu_count()} cores",
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory": min([memory.total, *limits]),
        "memory_free": min([memory.available, *limits]),
        "cuda": [torch.cuda.get_device_name(number) for number in cuda],
    }


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _text(path: str) -> str:
    file = Path(path)
    return file.read_text(encoding="utf-8").strip() if file.is_file() else ""


def _software() -> Iterator[Check]:
    """Python and every library, against what the package asks for."""
    try:
        about = metadata.metadata(PACKAGE)
    except metadata.PackageNotFoundError:
        yield Check("package", "not installed", ok=False, advice="pip install -e . in the checkout")
        return
    wanted, here = about["Requires-Python"], platform.python_version()
    fits = here in SpecifierSet(wanted)
    yield Check("Python", here, fits, advice=f"set the environment up with Python {wanted}")
    asked = [Requirement(text) for text in metadata.requires(PACKAGE) or ()]
    wrong = [w for w in map(_misfit, asked) if w]
    found = "; ".join(wrong) or f"all {len([r for r in asked if not r.marker])} as asked for"
    yield Check("libraries", found, not wrong, advice="make setup, or pip install moee-analysis")


def _misfit(asked: Requirement) -> str:
    """What is wrong with a library that is needed; "" if nothing is."""
    if asked.marker and not asked.marker.evaluate({"extra": ""}):
        return ""
    try:
        version = metadata.version(asked.name)
    except metadata.PackageNotFoundError:
        return f"{asked.name} is missing"
    fits = asked.specifier.contains(version, prereleases=True)
    return "" if fits else f"{asked.name} {version}, not {asked.specifier}"


def _machine_checks() -> Iterator[Check]:
    found = machine()
    cores, free = found["cores"], found["memory_free"]
    yield Check("cores", f"{cores} usable, {found['threads']} threads in torch")
    yield Check(
        "memory", f"{free / 1e9:.1f} of {found['memory'] / 1e9:.1f} GB free", free > LITTLE_MEMORY,
        required=False, advice="close other programs, or take --preset smoke",
    )  # fmt: skip


def _optional() -> Iterator[Check]:
    """Parts that something gains by, and nothing else needs."""
    cuda = machine()["cuda"]
    browser = next(filter(None, map(shutil.which, BROWSERS)), "")
    conda = os.environ.get("CONDA_PREFIX", "")
    lab, metis = (importlib.util.find_spec(name) for name in ("jupyterlab", "pymetis"))
    for name, found, advice in (
        ("CUDA", ", ".join(cuda), "everything runs on the CPU"),
        ("METIS", "pymetis" if metis else "", "pip install pymetis; else graphs are divided "
         "by their eigenvectors"),
        ("JupyterLab", "jupyterlab" if lab else "", "pip install jupyterlab, for moee lab"),
        ("Chromium", browser, "only tests in a browser need it"),
        ("conda", conda, "not needed where pip has set everything up"),
    ):  # fmt: skip
        yield Check(name, found or "none", bool(found), required=False, advice=advice)


def _store() -> Iterator[Check]:
    """The folder that keeps what was computed: its place, its size, what is free there."""
    advice = "set MOEE_STORE to a folder that can be written to"
    try:
        folder = store_folder()
        there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        taken = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(there).free
    except (MoeeError, OSError) as error:
        found = error.found if isinstance(error, MoeeError) else str(error)
        yield Check("store", found, ok=False, advice=advice)
        return
    fits = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    yield Check("store", f"{folder}: {taken / 1e9:.2f} GB", fits, advice=advice)
    yield Check(
        "disk", f"{free / 1e9:.1f} GB free there", free > LITTLE_DISK, required=False,
        advice="make room, or set MOEE_STORE to another disk",
    )  # fmt: skip


def _places() -> Iterator[Check]:
    """Folders that libraries write to."""
    try:
        with tempfile.TemporaryFile():
            yield Check("temporary files", tempfile.gettempdir())
    except OSError as error:
        advice = "set TMPDIR to a folder that can be written to"
        yield Check("temporary files", str(error), ok=False, advice=advice)
    try:
        yield Check("numba's cache", check_numba_cache())
    except MoeeError as error:
        yield Check("numba's cache", error.found, ok=False, advice=error.hint)


def _bundled() -> Iterator[Check]:
    """The project's own files: notebooks, and a model that predicts what it should."""
    try:
        count = len(list(notebooks_folder().glob("*.ipynb")))
        yield Check("notebooks", f"{count}")
        share = _share_right()
    except MoeeError as error:
        yield Check("bundled model", str(error), ok=False, advice="install the project again")
        return
    yield Check(
        "bundled model", f"names {share:.0%} of {SCENES} scenes it has never seen", share >= RIGHT,
        advice=f"it should name {RIGHT:.0%} or more: install the project again, or another torch",
    )  # fmt: skip


def _share_right() -> float:
    """Share of unseen scenes whose class the bundled model predicts."""
    model, scenes = load_model(), load_images(limit=SCENES)
    with torch.inference_mode():
        found = torch.cat([model(batch).argmax(dim=1) for batch in scenes.batches(model)])
    return float((found.numpy() == scenes.labels(model)).mean())
