"""All benchmarks of speed, one after the other: clustering, extraction, inference.

``python benchmarks/speed.py``, or ``make bench``, runs each with its own defaults on one model;
their own commands have more options.
"""

from collections.abc import Sequence

import clustering
import extraction
import inference
from common import INPUTS, parser_of


def main(argv: Sequence[str] | None = None) -> None:
    """Run all of them."""
    asked = parser_of("speed", __doc__, *INPUTS, out="reports/speed").parse_args(argv)
    model = ["--model", asked.model, "--out", str(asked.out)]
    if asked.weights:
        model += ["--weights", asked.weights]
    calibrated = [*model, "--calibration", asked.calibration, "--preset", asked.preset]
    clustering.main([*model, "--images", asked.calibration])
    extraction.main(calibrated)
    inference.main([*calibrated, "--images", asked.images])


if __name__ == "__main__":
    main()
