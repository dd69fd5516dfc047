"""How fast scenes render on one core: ``python benchmarks/scenes.py [--json FILE]``."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from moee_analysis.data.scenes.scene import CLASSES, render

WANTED = 500


def seconds_per_class(scenes: int) -> dict[str, float]:
    """Seconds one scene of each class takes: the fastest of three rounds."""
    return {
        name: min(_round(label, scenes) for _ in range(3)) / scenes
        for label, name in enumerate(CLASSES)
    }


def _round(label: int, scenes: int) -> float:
    start = time.perf_counter()
    for index in range(scenes):
        render(0, index, label=label)
    return time.perf_counter() - start


def main() -> None:
    """Print the table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="scenes per class and round")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    seconds = seconds_per_class(options.scenes)
    rates = {name: round(1 / value) for name, value in seconds.items()}
    rates["all classes"] = round(len(seconds) / sum(seconds.values()))
    print(f"{'class':<16}images/s on one core (wanted: {WANTED})")
    for name, rate in rates.items():
        print(f"{name:<16}{rate}")
    if options.json:
        options.json.write_text(
            json.dumps({"wanted": WANTED, "images_per_second": rates}, indent=2)
        )


if __name__ == "__main__":
    main()
