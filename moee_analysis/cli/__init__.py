"""The command line ``moee``: parse, call, print.

Exit codes: 0 done, 1 failed or interrupted, 2 bad input or no room (told in one line), 3 a report
below what was asked of it, 143 ended by SIGTERM.
"""

import errno
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from moee_analysis.cli.parser import command_parser
from moee_analysis.errors import MoeeError
from moee_analysis.utils.signals import Terminated, ended_in_order
from moee_analysis.utils.storage.refusals import FULL, refusal

NOTHING_LEFT = "nothing half-written was left behind"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; without any, print the help.

    Under torchrun, ``extract`` and ``finetune`` are one command of all processes.
    """
    parser = command_parser()
    arguments, others = parser.parse_known_args(argv)
    if others and arguments.command != "lab":
        arguments.parser.refuse_word(others[0])
    if arguments.command is None:
        parser.print_help()
        return 0
    text = ""
    try:
        with ended_in_order():
            code = run(arguments, others)
            print(end="", flush=True)  # where there is an output
    except BrokenPipeError:  # as of "| head": the rest has no reader
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except MoeeError as error:
        code, text = 2, str(error)
    except KeyboardInterrupt:
        code, text = 1, f"interrupted, {NOTHING_LEFT}"
    except Terminated as end:
        code, text = end.code, f"terminated, {NOTHING_LEFT}"
    except OSError as error:
        if error.errno not in (*FULL, errno.EROFS):
            raise
        full = MoeeError("room for what is printed", str(error), "make room there")
        place = error.filename
        code, text = 2, str(full if place is None else refusal(error, Path(place)))
    if text:
        print(f"moee: {text}", file=sys.stderr)
    return code


def run(arguments: Namespace, others: Sequence[str]) -> int:
    """Run a command, with no more libraries than it needs; ``others`` are JupyterLab's options."""
    if arguments.command == "lab":
        from moee_analysis.report.runner.jupyter import open_lab

        return open_lab(others)
    if arguments.command == "doctor":
        from moee_analysis.cli.doctor import doctor

        return doctor(arguments)
    from moee_analysis.cli import commands

    return getattr(commands, arguments.command)(arguments)
