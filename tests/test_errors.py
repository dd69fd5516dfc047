from __future__ import annotations

import copy

from moee_analysis.errors import MoeeError

ERROR = MoeeError("a folder at 'x'", "a file", "choose another place")


def test_one_line_says_what_was_expected_what_was_found_and_what_to_do():
    assert str(ERROR) == (
        "expected a folder at 'x'; found a file. What to do: choose another place."
    )


def test_the_three_parts_can_be_read_one_by_one():
    assert (ERROR.expected, ERROR.found, ERROR.hint) == (
        "a folder at 'x'", "a file", "choose another place",
    )  # fmt: skip


def test_the_error_can_be_rebuilt_from_its_parts():
    assert str(copy.copy(ERROR)) == str(ERROR)  # as a worker pool does
