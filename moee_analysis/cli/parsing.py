"""How a command tells of itself, and how it refuses what it cannot read: in one line."""

from __future__ import annotations

import argparse
import difflib
import shutil
from typing import NoReturn

from moee_analysis.errors import MoeeError


class Help(argparse.RawDescriptionHelpFormatter):
    """Leaves paragraphs and examples as they are, and names defaults that say something."""

    def __init__(self, prog: str) -> None:
        width = min(100, shutil.get_terminal_size().columns) - 2
        super().__init__(prog, max_help_position=28, width=width)

    def _get_help_string(self, action: argparse.Action) -> str:
        told, silent = action.help or "", (None, False, argparse.SUPPRESS)
        if any(action.default is each for each in silent) or "(default" in told:
            return told
        return f"{told} (default: %(default)s)"

    def _format_action(self, action: argparse.Action) -> str:
        if action.nargs != argparse.PARSER:
            return super()._format_action(action)
        return "".join(map(self._format_action, action._get_subactions()))  # without a headline


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong and what to do, and exits with 2."""

    def error(self, message: str) -> NoReturn:
        """Refuse a call; a message that does not say what to do refers to the help."""
        told = " ".join(message.split())
        hint = "" if "What to do: " in told else f". What to do: see {self.prog} --help."
        self.exit(2, f"{self.prog}: {told}{hint}\n")

    def refuse_word(self, word: str) -> NoReturn:
        """Refuse a word that means nothing here, with the options it may be a slip of."""
        close = difflib.get_close_matches(word.partition("=")[0], self._option_string_actions)
        meant = f"did you mean {' or '.join(close)}? If not, " if close else ""
        hint = f"{meant}see {self.prog} --help"
        self.error(str(MoeeError("an option of this command", repr(word), hint)))
