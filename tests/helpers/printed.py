"""What an example of a document prints, beside what the document says."""

import re

import pytest

NUMBER = re.compile(r"\d+(?:\.\d+)?")


def assert_alike(printed: str, quoted: str) -> None:
    """The same words at the end, after what ``extract`` says of itself, and numbers near those."""
    printed = "".join(printed.splitlines(keepends=True)[-len(quoted.splitlines()) :])
    assert NUMBER.sub("#", printed) == NUMBER.sub("#", quoted), printed
    for found, told in zip(NUMBER.findall(printed), NUMBER.findall(quoted), strict=True):
        last_digit = 10.0 ** -len(told.partition(".")[2])
        assert float(found) == pytest.approx(float(told), rel=0.2, abs=3 * last_digit), printed
