"""Commands as functions of their words."""

import re

from moee_analysis import cli
from tests.helpers.models import SMALL_VIT


def run_cli(*command):
    return cli.main([str(part) for part in command])


def refused(capsys, *command):
    """The one line that a bad command gets."""
    capsys.readouterr()  # commands before it may have told their progress
    try:
        code = run_cli(*command)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert re.match(r"moee( [a-z]+: argument \S+)?: expected .*\. What to do: .*\.$", line)
    return line


def model_of(own):
    """Options that name a model of one's own."""
    return ["--model", SMALL_VIT, "--weights", own / "tuned.pth", "--img-size", 64, "--in-chans", 1]


def extraction(own, *options):
    images = ["--calibration", own / "calibration", "--preset", "smoke"]
    return ["extract", *model_of(own), *images, *options]
