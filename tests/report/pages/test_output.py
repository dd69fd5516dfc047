import pytest
from nbformat.v4 import new_code_cell, new_output

from moee_analysis.report.pages.output import (
    LONGEST,
    LONGEST_MARKUP,
    as_typed,
    join_streams,
    shorten,
    shortened,
)

MANY = 1_000_000


def printed(text, name="stdout"):
    return new_output("stream", name=name, text=text)


def test_text_is_what_a_terminal_shows():
    for text, seen in {
        "one\ntwo\n": "one\ntwo\n", "10 %\r20 %\r100 %": "100 %", "": "",
        "10 %\r\n20 %\r\n": "10 %\n20 %\n", "left\rright\rkept\r": "kept",
        "ab\b\bcd\n\b\bx": "cd\nx",
        # steps that grow with the square of the length would take hours
        "x" * MANY: "x" * MANY, "x\b" * MANY: "", "x\r" * MANY: "x",
        "x" * MANY + "\b" * MANY: "", "x\n" * MANY: "x\n" * MANY,
    }.items():  # fmt: skip
        assert as_typed(text) == seen


def test_each_stream_becomes_one_output_where_it_began_standard_output_first():
    result = new_output("display_data", data={"text/plain": "shown"})
    parts = [printed("1 %\r"), result, printed("2 %\r"), printed("oh", "stderr"), printed("3 %")]
    cell = new_code_cell(outputs=parts)
    join_streams(cell)
    assert [(o.get("name"), o.get("text")) for o in cell.outputs] == [
        ("stdout", "3 %"), (None, None), ("stderr", "oh"),
    ]  # fmt: skip
    cell = new_code_cell(outputs=[printed("warned", "stderr"), printed("said")])
    join_streams(cell)
    assert [output.text for output in cell.outputs] == ["said", "warned"]


def test_what_is_too_long_keeps_its_beginning_and_its_end():
    told = shortened(f"first{'x' * MANY}last")
    assert told.startswith("first")
    assert told.endswith("last")
    assert f"[{MANY + 9 - LONGEST} characters are left out here; the notebook has them]" in told
    assert len(told) < LONGEST + 100
    assert shortened("x" * LONGEST) == "x" * LONGEST
    assert shortened("\x1b[31mx\x1b[0m" * (LONGEST // 2)) == "x" * (LONGEST // 2)
    assert "\x1b" not in shortened("\x1b[31mx\x1b[0m" * MANY)
    for output in (
        printed("x" * MANY),
        new_output("execute_result", data={"text/plain": "x" * MANY}),
        new_output("error", ename="E", evalue="x", traceback=["x" * MANY]),
    ):
        shorten(output)
        assert len(str(output)) < LONGEST + 1000


@pytest.mark.parametrize("kind", ["text/html", "text/markdown", "text/latex", "image/svg+xml"])
def test_markup_that_is_too_long_is_left_out_and_that_is_told(kind):
    for plain in ({}, {"text/plain": "x" * MANY}):
        output = new_output("display_data", data={kind: "<b>" * MANY, "image/png": "y", **plain})
        shorten(output)
        assert output.data.keys() == {"image/png", "text/plain"}
        assert f"[{3 * MANY} characters of {kind} are left out here" in output.data["text/plain"]
        assert len(output.data["text/plain"]) < LONGEST + 200
    data = {kind: "x" * LONGEST_MARKUP, "image/png": "y" * MANY}
    output = new_output("display_data", data=dict(data))
    shorten(output)
    assert output.data == data
