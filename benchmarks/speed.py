"""All benchmarks of speed, one after the other: clustering, extraction, inference.

``python benchmarks/speed.py``, or ``make bench``, runs each with its own defaults on one model;
their own commands have more options.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import clustering
import extraction
import inference
from fidelity import add_inputs

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> None:
    """Run all of them."""
    options = _parser().parse_args(argv)
    model = ["--model", options.model, "--out", str(options.out)]
    if options.weights:
        model += ["--weights", options.weights]
    calibrated = [*model, "--calibration", options.calibration, "--preset", options.preset]
    clustering.main([*model, "--images", options.calibration])
    extraction.main(calibrated)
    inference.main([*calibrated, "--images", options.images])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_inputs(parser)
    parser.add_argument("--out", type=Path, default=Path("reports/speed"))
    return parser


if __name__ == "__main__":
    main()
