"""What a measure may be asked about: a run with images, or the routes of some systems."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.routing.routes import Routes, model_of, routes
from moee_analysis.utils.checks import layer_numbers

Source = Extraction | nn.Module | Routes | Sequence[Routes]


def all_routes(source: Source, images: ImageSet | None = None) -> list[Routes]:
    """Return the routes of ``source``; a run or a routed model is first asked to route ``images``.

    Raises
    ------
    MoeeError
        A run without images, or no routes at all.
    """
    if isinstance(source, Routes):
        return [source]
    if not isinstance(source, Sequence):
        return [_routed(source, images)]
    if not source or not all(isinstance(one, Routes) for one in source):
        raise MoeeError(
            "a run, its routes, or a sequence of routes",
            f"{type(source).__name__} of {len(source)} items that are not all routes",
            "make routes with measure.routes(model, images)",
        )
    return list(source)


def chosen_layers(names: Iterable[int], wanted: Sequence[int]) -> list[int]:
    """Return ``wanted`` layers in order, or all of ``names`` if none are wanted.

    Raises
    ------
    MoeeError
        A layer that is not among ``names``, or what is no tuple of layers.
    """
    layer_numbers(wanted)
    wanted = set(wanted or ())
    known = sorted(names)
    missing = sorted(wanted - set(known))
    if missing:
        raise MoeeError(
            f"layers among {', '.join(map(str, known))} (those with experts)",
            f"layer {missing[0]}",
            "layers are counted from 0; a layer left dense has no experts",
        )
    return sorted(wanted) or known


def chosen_classes(names: Mapping[int, str], wanted: Sequence[int | str]) -> list[int]:
    """Return class indices of ``wanted`` (names or indices, in that order), or all in order.

    A name is compared without regard to case, spaces and underscores.

    Raises
    ------
    MoeeError
        A class of which there is no image.
    """
    index = {plain(name): number for number, name in names.items()} | {n: n for n in names}
    keys = [plain(item) if isinstance(item, str) else item for item in wanted]
    missing = [str(item) for item, key in zip(wanted, keys, strict=True) if key not in index]
    if missing:
        known = ", ".join(list(names.values())[:6])
        raise MoeeError(
            f"classes of the images (such as {known})",
            f"no image of {', '.join(missing[:3])}",
            "choose classes that the images have, or add images of them",
        )
    return [index[key] for key in keys] or sorted(names)


def families_of(names: Sequence[str], families: Mapping[str, str]) -> list[str]:
    """Return the family of every class of ``names``, which are compared as :func:`plain` does.

    Raises
    ------
    MoeeError
        A class without a family.
    """
    known = {plain(name): family for name, family in families.items()}
    missing = [name for name in names if plain(name) not in known]
    if missing:
        raise MoeeError(
            "a family of every class", f"none of {', '.join(missing[:3])}",
            "add it to families, or choose the classes that have one",
        )  # fmt: skip
    return [known[plain(name)] for name in names]


def plain(name: str) -> str:
    """Return ``name`` as it is compared: ``Fire engine`` is ``fire_engine``."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower())


def _routed(run: Extraction | nn.Module, images: ImageSet | None) -> Routes:
    if images is None:
        raise MoeeError(
            "images to route through the run", "none", "pass images as the second argument"
        )
    return routes(model_of(run), images)
