"""Images that something was made from are never images it is measured on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    from moee_analysis.images import ImageSet


def check_apart(made_from: ImageSet, seen: ImageSet, *, use: str) -> None:
    """Refuse images to evaluate that are among those that something is ``made_from``.

    Parameters
    ----------
    use
        What the others are for: ``"used for calibration"``.

    Raises
    ------
    MoeeError
        Pictures of the same content in both sets.
    """
    contents = [{s.source.digest(row) for row in s.rows} for s in (made_from, seen)]
    if both := set.intersection(*contents):
        raise MoeeError(
            f"images to evaluate that are not {use}", f"{len(both)} that are", "choose others"
        )
