"""The lesson: its terms lead somewhere, its solutions print what it quotes, it takes 90 minutes."""

import re

from tests.conftest import ROOT
from tests.helpers.printed import assert_alike

LESSON, EXERCISES = (ROOT / "docs" / f"course{which}.md" for which in ("", "_exercises"))
CODE = re.compile(r"^```python\n([^`]*)```$", re.M)
SOLUTION = re.compile(r"^```python\n([^`]*)```\n\nIt prints\n\n```text\n([^`]*)```$", re.M)


def test_every_term_of_the_glossary_links_to_a_cell():
    rows = LESSON.read_text().partition("## Glossary")[2].splitlines()
    terms = [row for row in rows if row.startswith("|")][2:]
    assert len(terms) >= 25
    assert all("#cell-id=" in row.split("|")[1] for row in terms)
    names = [re.search(r"\[(.+?)\]", row)[1].lower() for row in terms]
    assert names == sorted(names)


def test_the_blocks_of_the_lesson_take_90_minutes():
    minutes = re.findall(r"^## .*\((\d+) minutes\)$", LESSON.read_text(), re.M)
    assert sum(map(int, minutes)) == 90


def test_every_exercise_has_a_solution_that_is_hidden():
    each = EXERCISES.read_text().partition("\n## More")[0].split("\n## ")[1:]
    assert 6 <= len(each) <= 8
    for exercise in each:
        asked, _, hidden = exercise.partition("<details><summary>Solution</summary>\n")
        assert "```" not in asked
        assert SOLUTION.search(hidden)
        assert hidden.rstrip().endswith("</details>")


def test_the_solutions_run_and_print_what_the_lesson_quotes(tmp_path, monkeypatch, capsys):
    """In order, in one namespace; numbers may differ as much as those of two machines."""
    monkeypatch.setenv("MOEE_STORE", str(tmp_path))
    text = EXERCISES.read_text()
    first, *solutions = CODE.findall(text)
    quoted = dict(SOLUTION.findall(text))
    assert len(quoted) == len(solutions)
    names: dict[str, object] = {}
    exec(first, names)
    for code in solutions:
        capsys.readouterr()
        exec(code, names)
        assert_alike(capsys.readouterr().out, quoted[code])
