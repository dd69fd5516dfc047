"""How a command tells of itself, and how it refuses what it cannot read: in one line."""

import argparse
import difflib
import re
import shutil
import textwrap
import tomllib
from pathlib import Path
from typing import Any, NoReturn

from moee_analysis.errors import MoeeError

WIDTH = 88
GUIDES: dict[str, Any] = tomllib.loads(
    Path(__file__).with_name("guides.toml").read_text(encoding="utf-8")
)
"""The texts of ``--help``: of all commands, and of each by its name."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Leaves paragraphs and examples as they are, and names defaults that say something."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        text, silent = action.help or "", (None, False, argparse.SUPPRESS)
        if any(action.default is each for each in silent) or "(default" in text:
            return text
        return f"{text} (default: %(default)s)"

    def _format_action(self, action: argparse.Action) -> str:
        if action.nargs != argparse.PARSER:
            return super()._format_action(action)
        return "".join(map(self._format_action, action._get_subactions()))  # without a headline


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


def texts_of(command: str) -> dict[str, str]:
    """Arguments of the parser of a command: its line, paragraph and examples."""
    guide = GUIDES[command]
    return {
        "help": guide["line"],
        "description": textwrap.fill(guide["description"].strip(), WIDTH),
        "epilog": _list_examples(guide["examples"]),
    }


def first_steps() -> str:
    """Examples and advice below the list of all commands."""
    return f"{_list_examples(GUIDES['first_steps'])}\n\n{GUIDES['afterwards']}"


def _list_examples(examples: list[list[str]]) -> str:
    return "examples:\n" + "\n".join(f"  # {text}\n{_fold(line)}" for text, line in examples)


def _fold(command: str) -> str:
    """A long command in several lines, as a shell takes them; options stay with their values."""
    joined = re.sub(r"(--\S+) (?!--)", "\\1\0", command)
    lines = textwrap.wrap(joined, WIDTH - 8, break_long_words=False, break_on_hyphens=False)
    return "  " + " \\\n      ".join(lines).replace("\0", " ")
