"""What the command line takes: every command with its options, their defaults and units.

``guides.toml`` explains each of them. What cannot be read is refused in one line.
"""

import argparse
import dataclasses
import difflib
import re
import shutil
import textwrap
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from moee_analysis.cli import values
from moee_analysis.errors import MoeeError
from moee_analysis.extraction import config as extract_config
from moee_analysis.extraction.config import PRESETS, RECIPES, ExtractConfig
from moee_analysis.report.runner.choose import notebooks_named, read_setting
from moee_analysis.report.summary.gates import read_gate
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.utils import checks
from moee_analysis.utils.environment import version

Container = argparse._ActionsContainer
Option = tuple[str, dict[str, Any]]
WIDTH = 88
GUIDES: dict[str, Any] = tomllib.loads(Path(__file__).with_name("guides.toml").read_text("utf-8"))
"""The texts of ``--help``: of all commands, and of each by its name."""

LARGEST = 10_000  # pixels of a side, or channels
LARGEST_GB = 1e9  # as ``Limits`` have it


class Help(argparse.RawDescriptionHelpFormatter):
    """Leaves paragraphs and examples as they are, and names defaults that say something."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, silent = action.help or "", (None, False, argparse.SUPPRESS)
        told = "(default" in text or any(action.default is each for each in silent)
        return text if told else f"{text} (default: %(default)s)"

    def _format_action(self, action: argparse.Action) -> str:
        if action.nargs == argparse.PARSER:  # without a headline
            return "".join(map(self._format_action, action._get_subactions()))
        return super()._format_action(action)


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and what to do, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse a call; a message that does not say what to do refers to the help."""
        text = " ".join(message.split())
        hint = "" if "What to do: " in text else f". What to do: see {self.prog} --help."
        self.exit(2, f"{self.prog}: {text}{hint}\n")

    def refuse_word(self, word: str) -> NoReturn:
        """Refuse a word that means nothing here, with the options it may be a slip of."""
        close = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions)
        meant = f"did you mean {' or '.join(close)}? If not, " if close else ""
        hint = f"{meant}see {self.prog} --help"
        self.error(str(MoeeError("an option of this command", repr(word), hint)))


def _list_examples(examples: list[list[str]]) -> str:
    """Comments and commands, long ones in several lines, as a shell takes them."""
    lines = ["examples:"]
    for text, command in examples:
        joined = re.sub(r"(--\S+) (?!--)", "\\1\0", command)  # options stay with their values
        parts = textwrap.wrap(joined, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
        lines += [f"  # {text}", "  " + " \\\n      ".join(parts).replace("\0", " ")]
    return "\n".join(lines)


def option(name: str, reader: values.Reader, metavar: str = "X", **more: Any) -> Option:
    """An option, or an argument, whose value is made by a ``reader``."""
    return name, {"type": values.told(reader), "metavar": metavar, **more}


def choice(name: str, choices: Iterable[str], **more: Any) -> Option:
    """An option that is one of the ``choices``."""
    reader = values.passing(str, checks.one_of, "one", choices=list(choices))
    return option(name, reader, f"{{{','.join(choices)}}}", **more)


def switch(name: str) -> Option:
    """An option without a value."""
    return name, {"action": "store_true"}


def settings(config: type, readers: dict[str, Any], metavar: str = "X") -> list[Option]:
    """Options for fields of a ``config``, with its defaults; each has a reader, or choices."""
    found = []
    for field in dataclasses.fields(config):
        reader, flag = readers.get(field.name), f"--{field.name.replace('_', '-')}"
        if callable(reader):
            found.append(option(flag, reader, metavar, default=field.default))
        elif reader:
            found.append(choice(flag, reader, default=field.default))
    return found


RUN = option("run", values.run_folder, "RUN")
IMAGES = option("--images", values.images, "DIR", default="bundled")
CALIBRATION = option("--calibration", values.images, "DIR", default="bundled")
OUT = option("--out", values.new_folder, "DIR", required=True)
JSON = option("--json", values.new_file, "FILE")
STORE = option("--store", values.store, "DIR")
WEIGHTS = option("--weights", values.existing_file, "FILE")
CLASSES = option("--classes", values.existing_file, "FILE")
SIZES = [option(flag, values.whole(most=LARGEST), "N") for flag in ("--img-size", "--in-chans")]
MODEL = [option("--model", values.name, "NAME", default="bundled"), WEIGHTS, CLASSES, *SIZES]
PRESET = settings(ExtractConfig, {"preset": PRESETS, "seed": values.seed}, "N")
DEVICE = [option("--device", values.device, "DEVICE", default="cpu"), switch("--strict")]
SHARES = dict.fromkeys(("macs_reduction", "params_reduction", "variance_kept"), values.share)
PIECES = {name: extract_config.CHOICES[name] for name in ("noise", "attention", "merging")}
IN_TIME = {"budget_in": extract_config.CHOICES["budget_in"], "for_batch": values.whole()}
FINETUNE_SETTINGS = {
    "epochs": values.whole(), "learning_rate": values.real(above=0), "batch_size": values.whole(),
    "accumulate": values.whole(), "weight_decay": values.real(least=0),
    "block_weight": values.real(least=0), "ema": values.part, "held_out": values.part,
    "patience": values.whole(), "seed": values.seed, **checks.choices_of(FinetuneConfig),
}  # fmt: skip

COMMANDS: dict[str, dict[str, list[Option]]] = {  # by the title above them, "" for the first
    "extract": {
        "": [OUT, *MODEL, CALIBRATION, *PRESET, *DEVICE],
        "how much to save": settings(ExtractConfig, SHARES, "SHARE"),
        "how": [
            *settings(ExtractConfig, {"recipe": RECIPES}),
            choice("--reduce", extract_config.CLUSTER_CHOICES["reduce"]),
            *settings(ExtractConfig, PIECES),
        ],
        "in time": settings(ExtractConfig, IN_TIME, "IMAGES"),
        "memory and disk": [
            STORE,
            option("--memory-gb", values.real(above=0, most=LARGEST_GB), "GB"),
            option("--disk-gb", values.real(least=0, most=LARGEST_GB), "GB"),
        ],
    },
    "evaluate": {"": [RUN, IMAGES, JSON, CLASSES, WEIGHTS, *DEVICE]},
    "finetune": {
        "": [RUN, IMAGES, OUT, option("--limit", values.whole(), "N"), WEIGHTS, *DEVICE],
        "training": settings(FinetuneConfig, FINETUNE_SETTINGS),
    },
    "compare": {"": [
        *MODEL, CALIBRATION, IMAGES,
        option("--macs-reduction", values.part, "SHARE", nargs="+", default=[0.28]),
        option("--systems", values.name, "NAME", nargs="+"),
        option("--seeds", values.whole(most=1000), "N", default=1),
        switch("--no-latency"), JSON, STORE, *PRESET, *DEVICE,
    ]},
    "export": {"": [
        RUN, choice("--format", ("onnx", "pt2"), default="onnx"),
        option("--out", values.new_file, "FILE", required=True), IMAGES,
    ]},
    "atlas": {"": [
        RUN, IMAGES, option("--out", values.new_file, "FILE", required=True),
        option("--limit", values.whole(), "N", default=200),
        CLASSES, switch("--open"), WEIGHTS, *DEVICE,
    ]},
    "report": {"": [
        *MODEL, IMAGES, option("--calibration", values.images, "DIR"),
        option("--out", values.new_folder, "DIR", default="reports"), switch("--open"), *PRESET,
    ], "which notebooks, and how": [
        option("--only", notebooks_named, "NAMES"),
        option("--set", read_setting, "NAME=VALUE", action="append", default=[]),
        option("--jobs", values.whole(most=1000), "N"),
    ], "what it must come to": [
        option("--fail-under", read_gate, "NAME=NUMBER", action="append", default=[]),
        option("--against", values.earlier_report, "OLD"),
    ]},
    "store": {"": [STORE, option("--prune", values.size, "SIZE")]},
    "lab": {},
    "doctor": {"": [*MODEL, switch("--json")]},
}  # fmt: skip


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``command`` is None where none is given."""
    advice = f"{_list_examples(GUIDES['first_steps'])}\n\n{GUIDES['afterwards']}"
    about = {"description": GUIDES["what_it_is"], "epilog": advice}
    parser = Parser(prog="moee", formatter_class=Help, **about)
    parser.add_argument("--version", action="version", version=f"moee {version()}")
    parser.set_defaults(command=None, parser=parser)
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, options in COMMANDS.items():
        guide = GUIDES[name]
        description = textwrap.fill(guide["description"].strip(), WIDTH)
        texts = {"help": guide["line"], "epilog": _list_examples(guide["examples"])}
        command = listed.add_parser(name, formatter_class=Help, description=description, **texts)
        command.set_defaults(command=name, parser=command)
        for title, group in options.items():
            add_options(command.add_argument_group(title) if title else command, name, group)
        if name == "lab":
            command.usage = "moee lab [-h] [options of jupyter lab ...]"
    return parser


def add_options(parser: Container, command: str, options: Iterable[Option]) -> None:
    """Add ``options`` to a ``parser``, or a group of it, with their texts for this ``command``."""
    texts = GUIDES["options"]
    for name, about in options:
        parser.add_argument(name, help=texts.get(f"{command} {name}") or texts[name], **about)
