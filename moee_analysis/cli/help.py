"""What ``--help`` says of every command: a line, a paragraph, and examples that work as typed."""

from __future__ import annotations

import re
import textwrap
from dataclasses import dataclass

WIDTH = 88

WHAT_IT_IS = (
    "Take a trained vision network apart into a mixture of experts, and see what each part does."
)

FIRST_STEPS = (
    ("take the bundled model apart, to 28 % fewer MACs (half a minute on two cores)",
     "moee extract --recipe best --macs-reduction 0.28 --out runs/first"),
    ("how much of its accuracy is left, on scenes that were not used",
     "moee evaluate runs/first"),
    ("every notebook on a few images, as a report in the browser",
     "moee report --preset smoke --open"),
)  # fmt: skip
"""Comments and commands, in the order a newcomer needs them; they need no download."""

AFTERWARDS = """\
moee COMMAND --help has the options and examples of a command. If something does not work,
or to know what a run would cost here: moee doctor"""


@dataclass(frozen=True)
class Guide:
    """What is told of one command: in the list of all, above its options, and below them."""

    line: str
    description: str
    examples: tuple[tuple[str, str], ...]


GUIDES = {
    "extract": Guide(
        "take a model apart into a mixture of experts",
        "Takes a model apart into a mixture of experts: the hidden activations of calibration "
        "images are clustered, every cluster becomes an expert with the hidden neurons it needs, "
        "and every token is routed to the nearest one. Nothing is trained, and labels are not "
        "used. The run is a folder that evaluate, finetune and atlas take, and moee.load in "
        "Python.",
        (
            FIRST_STEPS[0],
            ("as published, of few images and tokens",
             "moee extract --recipe paper --variance-kept 0.9 --preset smoke --out runs/paper"),
            ("a model and images of your own, its attention made smaller too",
             "moee extract --model deit_tiny_patch16_224 --weights deit_tiny.safetensors "
             "--calibration images/calibration --recipe best --macs-reduction 0.28 "
             "--attention low_rank --out runs/deit"),
        ),
    ),
    "evaluate": Guide(
        "compare a run with its dense model: top-1, MACs, parameters",
        "Compares a run with its dense model on labelled images: top-1, agreement, MACs and "
        "stored parameters, beside random routing. Take images that the run was not calibrated on.",
        (
            FIRST_STEPS[1],
            ("photographs of your own, all numbers into a file",
             "moee evaluate runs/deit --images images/evaluation --json deit.json"),
        ),
    ),
    "finetune": Guide(
        "train a run towards its dense model, without labels",
        "Trains a run to predict what its dense model predicts; labels are not used. A command "
        "that was killed goes on after its last whole epoch when it is repeated.",
        (
            ("two passes over 600 of the bundled scenes",
             "moee finetune runs/first --epochs 2 --limit 600 --out runs/tuned"),
            ("routers that learn, images of your own",
             "moee finetune runs/deit --images images/calibration --router straight_through "
             "--out runs/deit_tuned"),
        ),
    ),
    "compare": Guide(
        "set every training-free system side by side at the same MACs",
        "Converts a model by every training-free system, at the same MACs, and measures all of "
        "them on the same images, with random, constant and oracle routing and static pruning "
        "beside each.",
        (
            ("all systems on few images",
             "moee compare --preset smoke"),
            ("two of them, two budgets, two seeds, all numbers into a file",
             'moee compare --systems "MoEE, best" "static: magnitude" --macs-reduction 0.2 0.36 '
             "--seeds 2 --json rivals.json"),
        ),
    ),
    "atlas": Guide(
        "write a page to click through the experts of a run",
        "Writes one HTML file, which needs no network, to click through the experts of a run: "
        "where each is used, and on which images.",
        (
            ("of the bundled scenes, opened in the browser",
             "moee atlas runs/first --out atlas.html --open"),
            ("of photographs of your own",
             "moee atlas runs/deit --images images/evaluation --limit 400 --out deit.html"),
        ),
    ),
    "report": Guide(
        "run every notebook and write an HTML report",
        "Runs every notebook in a process of its own, and makes a report of them that needs no "
        "network: for each a page, the executed notebook, its numbers, tables and figures. "
        "A notebook that fails does not stop the others. Without --calibration, half of --images "
        "is set aside for calibration and never evaluated.",
        (
            FIRST_STEPS[2],
            ("a model and images of your own",
             "moee report --model deit_tiny_patch16_224 --weights deit_tiny.safetensors "
             "--images images/classes"),
        ),
    ),
    "store": Guide(
        "list what the store holds, or remove what is oldest",
        "The store keeps recorded tokens, clusters, statistics and runs, so that none is computed "
        "twice. This lists them by run, with what a run has alone and what it shares, and by kind "
        "where no run is left. With --prune damaged folders go first, then those that were not "
        "used for longest, never what a running process uses. All of it can be made again.",
        (
            ("what there is",
             "moee store"),
            ("twenty gigabytes of it at most",
             "moee store --prune 20GB"),
        ),
    ),
    "lab": Guide(
        "open JupyterLab on the notebooks",
        "Opens JupyterLab on the project's notebooks, with this interpreter and without news or "
        "updates from the network. Further options are JupyterLab's own, and win over ours; "
        "jupyter lab --help lists them. Ctrl-C ends it.",
        (
            ("in the browser",
             "moee lab"),
            ("on a machine without one, at a port of your own",
             "moee lab --no-browser --port 8899"),
        ),
    ),
    "doctor": Guide(
        "say what works here, what is missing, and what a run would cost",
        "Says which versions, cores, memory and optional parts are here, whether the bundled model "
        "predicts what it should, and, by measuring for some seconds, about how long a run would "
        "take. Every problem comes with what to do. The exit code is 0 if all required parts "
        "work, else 1.",
        (
            ("here, and with the bundled model",
             "moee doctor"),
            ("what 5000 images of a model of your own would cost",
             "moee doctor --model deit_tiny_patch16_224 --weights deit_tiny.safetensors "
             "--images 5000 --preset full"),
            ("for machines",
             "moee doctor --json"),
        ),
    ),
}  # fmt: skip


def description_of(name: str) -> str:
    """What a command does, in lines."""
    return textwrap.fill(GUIDES[name].description, WIDTH)


def examples_of(name: str) -> str:
    """The examples of a command, in lines."""
    return _listed(GUIDES[name].examples)


def first_steps() -> str:
    """Examples and advice below the list of all commands."""
    return f"{_listed(FIRST_STEPS)}\n\n{AFTERWARDS}"


def _listed(examples: tuple[tuple[str, str], ...]) -> str:
    return "examples:\n" + "\n".join(f"  # {told}\n{_folded(line)}" for told, line in examples)


def _folded(command: str) -> str:
    """A long command in several lines, as a shell takes them; options stay with their values."""
    joined = re.sub(r"(--\S+) (?!--)", "\\1\0", command)
    lines = textwrap.wrap(joined, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n      ".join(lines).replace("\0", " ")
