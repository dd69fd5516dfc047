"""What ``--help`` says is true: its examples can be typed, its defaults are in force."""

import dataclasses
import re
import shlex
from importlib.metadata import version

import pytest

from moee_analysis import cli
from moee_analysis.baselines.registry import SYSTEMS
from moee_analysis.cli.parser import COMMANDS, FINETUNE_SETTINGS, GUIDES, command_parser
from moee_analysis.extraction import config as extract_config
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.utils.checks import choices_of

CHOICES = {ExtractConfig: extract_config.CHOICES, FinetuneConfig: choices_of(FinetuneConfig)}
FIRST_STEPS = GUIDES["first_steps"]
EXAMPLES = sorted({line for name in COMMANDS for _, line in GUIDES[name]["examples"]})


@pytest.fixture(autouse=True)
def _what_examples_name(tmp_path, monkeypatch):
    """The folders and files of the examples, where they are looked for."""
    monkeypatch.chdir(tmp_path)
    for run in ("first", "deit"):
        (tmp_path / "runs" / run).mkdir(parents=True)
        (tmp_path / "runs" / run / "run.json").write_text("{}")
    for images in ("calibration", "evaluation", "classes"):
        (tmp_path / "images" / images).mkdir(parents=True)
    (tmp_path / "deit_tiny.safetensors").write_bytes(b"")


def parsed(command):
    program, *words = shlex.split(command)
    assert program == "moee"
    return command_parser().parse_known_args(words)


def printed(capsys, *words):
    """What a question gets for an answer; asking is no error."""
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_examples_are_taken_as_typed_and_first_steps_need_nothing_that_a_newcomer_lacks():
    for command in EXAMPLES:
        arguments, others = parsed(command)
        assert arguments.command == shlex.split(command)[1]
        assert not others or arguments.command == "lab"
        assert set(getattr(arguments, "systems", None) or ()) <= set(SYSTEMS)
    steps = [parsed(command)[0] for _, command in FIRST_STEPS]
    assert steps[1].run == steps[0].out
    assert {command for _, command in FIRST_STEPS} <= set(EXAMPLES)
    for step in steps:
        needs = ("model", "images", "weights", "calibration")
        assert {getattr(step, name, None) for name in needs} <= {"bundled", None}


def test_the_list_of_commands_has_a_line_for_each(capsys):
    assert cli.main([]) == 0  # moee alone is a question for help
    out = capsys.readouterr().out
    assert out == printed(capsys, "--help")
    for name in COMMANDS:
        assert re.search(rf"^  {name} +{re.escape(GUIDES[name]['line'])}$", out, re.M)
    places = [out.index(command) for _, command in FIRST_STEPS]
    assert places == sorted(places)
    assert printed(capsys, "--version") == f"moee {version('moee-analysis')}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_explains_it_every_option_and_examples(name, capsys):
    out = printed(capsys, name, "--help")
    text = " ".join(out.replace("\\\n", " ").split())
    assert " ".join(GUIDES[name]["description"].split()) in text
    assert all(" ".join(command.split()) in text for _, command in GUIDES[name]["examples"])
    usage, options = out.split("\n\n", 1)
    for option in re.findall(r"--[a-z-]+", usage):
        assert re.search(rf"{option}\b[^\n]*\s+\S", options), option
    assert max(map(len, out.splitlines())) <= 100


def test_every_text_of_an_option_is_used():
    used = set()
    for command, groups in COMMANDS.items():
        for flag, _about in (each for options in groups.values() for each in options):
            own = f"{command} {flag}"
            used.add(own if own in GUIDES["options"] else flag)
    assert used == set(GUIDES["options"])


@pytest.mark.parametrize(
    ("command", "config"),
    [("extract --out new", ExtractConfig), ("finetune runs/first --out new", FinetuneConfig)],
)
def test_defaults_and_choices_are_those_of_the_configuration(command, config):
    arguments, _ = parsed(f"moee {command}")
    fields = [field for field in dataclasses.fields(config) if hasattr(arguments, field.name)]
    assert len(fields) >= 8
    assert {f.name: getattr(arguments, f.name) for f in fields} == {
        f.name: f.default for f in fields
    }
    assert len(FINETUNE_SETTINGS) == 13
    listed = {n: choices for n, choices in CHOICES[config].items() if hasattr(arguments, n)}
    assert len(listed) >= 2
    for name, choices in listed.items():
        for choice in choices:
            arguments, _ = parsed(f"moee {command} --{name.replace('_', '-')} {choice}")
            assert getattr(arguments, name) == choice
