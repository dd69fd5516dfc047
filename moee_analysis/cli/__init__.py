"""The command line ``moee``: what it says of itself, what it takes, what it does and prints.

Exit codes: 0 done, 1 failed, 2 bad input (told in one line).
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from moee_analysis.cli.finetune_options import FINETUNE_OPTIONS as FINETUNE_OPTIONS
from moee_analysis.cli.parser import command_parser
from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without any, print the help.

    Under torchrun, ``extract`` and ``finetune`` are one command of all processes.
    """
    parser = command_parser()
    arguments, others = parser.parse_known_args(argv)
    if arguments.command is None:
        parser.print_help()
        return 0
    if others and not arguments.passes_on:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    try:
        return arguments.command(arguments)
    except MoeeError as error:
        print(f"moee: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moee: interrupted, nothing half-written was left behind", file=sys.stderr)
        return 1
