"""How fast scenes render on one core: ``python benchmarks/scenes.py [--json FILE]``."""

import argparse
from pathlib import Path
from timeit import repeat

from moee_analysis.data.scenes.scene import CLASSES, render
from moee_analysis.utils.storage.files import write_json

WANTED = 500


def seconds_of(label: int, scenes: int) -> float:
    """Seconds one scene of a class takes: the fastest of three rounds."""
    rounds = repeat(lambda: [render(0, n, label=label) for n in range(scenes)], number=1, repeat=3)
    return min(rounds) / scenes


def main() -> None:
    """Print the table and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scenes", type=int, default=200, help="scenes per class and round")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args()
    seconds = {name: seconds_of(label, options.scenes) for label, name in enumerate(CLASSES)}
    rates = {name: round(1 / value) for name, value in seconds.items()}
    rates["all classes"] = round(len(seconds) / sum(seconds.values()))
    print(f"{'class':<16}images/s on one core (wanted: {WANTED})")
    for name, rate in rates.items():
        print(f"{name:<16}{rate}")
    if options.json:
        write_json(options.json, {"wanted": WANTED, "images_per_second": rates})


if __name__ == "__main__":
    main()
