"""The one error of the package: what was expected, what was found, what to do."""

from moee_analysis.outside_text import printable


class MoeeError(Exception):
    """Bad input or an impossible request, in one line.

    ``expected``, ``found`` and ``hint`` (what the user can do about it) are clauses without a
    capital letter or a full stop.
    """

    def __init__(self, expected: str, found: str, hint: str) -> None:
        super().__init__(expected, found, hint)
        self.expected = expected
        self.found = found
        self.hint = hint

    def __str__(self) -> str:
        return printable(f"expected {self.expected}; found {self.found}. What to do: {self.hint}.")
