"""Which notebooks a report runs, and what they are told."""

import pytest

from moee_analysis.errors import MoeeError
from moee_analysis.report.runner import choose
from moee_analysis.report.runner.choose import notebooks_named, read_setting


@pytest.fixture(autouse=True)
def _notebooks(tmp_path, monkeypatch):
    for name in ("01_extraction", "02_routing", "02_routing_more", "10_extras", "plain"):
        (tmp_path / f"{name}.ipynb").touch()
    monkeypatch.setattr(choose, "own_folder", lambda _: tmp_path)


@pytest.mark.parametrize(
    ("text", "names"),
    [("1", ["01_extraction"]), ("01", ["01_extraction"]), ("10,1", ["01_extraction", "10_extras"]),
     ("01_e", ["01_extraction"]), ("extrac", ["01_extraction"]),
     ("pl, 1", ["01_extraction", "plain"]),
     ("02_routing", ["02_routing"]), ("routing_m,02_routing_more", ["02_routing_more"])],
)  # fmt: skip
def test_notebooks_go_by_numbers_names_and_beginnings(text, names):
    assert [path.stem for path in notebooks_named(text)] == names


@pytest.mark.parametrize(
    ("text", "found"),
    [("nix", "'nix'"), ("", "''"), ("1,", "''"), ("3", "'3'"), ("²", "'²'"),
     ("extra", "which may be 01_extraction, 10_extras"), ("2", "02_routing, 02_routing_more")],
)  # fmt: skip
def test_one_that_is_not_there_is_refused_with_those_that_are(text, found):
    with pytest.raises(MoeeError, match=r"01_extraction, 02_routing, .*, plain") as refused:
        notebooks_named(text)
    assert found in refused.value.found


def test_a_setting_is_json_or_a_text():
    values = {
        "a=[2, 6]": [2, 6],
        "a=true": True,
        "a=x=y": "x=y",
        "a=": "",
        'a={"b": null}': {"b": None},
    }
    assert {text: read_setting(text) for text in values} == {t: ("a", v) for t, v in values.items()}
    assert read_setting("a=" + "[" * 100_000)[1][0] == "["
    for wrong in ("a", "=1", "a b=1", ""):
        with pytest.raises(MoeeError, match="NAME=VALUE"):
            read_setting(wrong)
