import copy

from moee_analysis.errors import MoeeError


def test_one_line_says_what_was_expected_what_was_found_and_what_to_do():
    parts = "a folder at 'x'", "a file", "choose another place"
    error = MoeeError(*parts)
    line = "expected a folder at 'x'; found a file. What to do: choose another place."
    assert str(error) == str(copy.copy(error)) == line  # a worker pool copies errors
    assert (error.expected, error.found, error.hint) == parts
