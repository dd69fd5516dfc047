"""The command line ``moee``: parse, call, print.

Exit codes: 0 done, 1 failed or interrupted, 2 bad input or no room (told in one line), 143 ended by
SIGTERM.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moee_analysis.cli.parser import command_parser
from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import Terminated, ended_in_order
from moee_analysis.utils.storage.refusals import FULL, refusal

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING_LEFT = "nothing half-written was left behind"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without any, print the help.

    Under torchrun, ``extract`` and ``finetune`` are one command of all processes.
    """
    parser = command_parser()
    arguments, others = parser.parse_known_args(argv)
    if others and not arguments.passes_on:
        arguments.parser.refuse_word(others[0])
    if arguments.command is None:
        parser.print_help()
        return 0
    arguments.others = others
    try:
        with ended_in_order():
            code = arguments.command(arguments)
            if sys.stdout is not None:  # closed from the beginning
                sys.stdout.flush()
    except BrokenPipeError:  # as of "| head": the rest has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (MoeeError, KeyboardInterrupt, Terminated, OSError) as end:
        code, text = _ending(end)
        print(f"moee: {text}", file=sys.stderr)
    return code


def _ending(end: BaseException) -> tuple[int, str]:
    """Exit code and line of a command that did not come to its end; other errors are raised."""
    if isinstance(end, MoeeError):
        return 2, str(end)
    if isinstance(end, KeyboardInterrupt):
        return 1, f"interrupted, {NOTHING_LEFT}"
    if isinstance(end, Terminated):
        return end.code, f"terminated, {NOTHING_LEFT}"
    if end.errno not in (*FULL, errno.EROFS):
        raise end
    if end.filename is None:
        return 2, str(MoeeError("room for what is printed", str(end), "make room there"))
    return 2, str(refusal(end, Path(end.filename)))
