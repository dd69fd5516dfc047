"""What ``--help`` says is true: its examples can be typed, its defaults are in force."""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest

from moee_analysis import cli
from moee_analysis.baselines.registry import SYSTEMS
from moee_analysis.cli.finetune_options import FINETUNE_OPTIONS
from moee_analysis.cli.help import FIRST_STEPS, GUIDES
from moee_analysis.cli.parser import COMMANDS, command_parser
from moee_analysis.extraction.cluster.clustering import REDUCTIONS
from moee_analysis.extraction.config.extract_config import NOISE_POLICIES
from moee_analysis.extraction.config.recipes import CHOICES, RECIPES, TOKEN_KINDS
from moee_analysis.training.augmentation import AUGMENTATIONS
from moee_analysis.training.finetune_config import PRECISIONS, FinetuneConfig
from moee_analysis.training.train_routers import ROUTERS

EXAMPLES = sorted(
    {command for guide in GUIDES.values() for _, command in guide.examples}
    | {command for _, command in FIRST_STEPS}
)


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


@pytest.mark.parametrize("command", EXAMPLES)
def test_an_example_is_taken_as_typed(command):
    arguments, others = parsed(command)
    assert arguments.command is COMMANDS[shlex.split(command)[1]][1]
    assert not others or arguments.passes_on


def test_first_steps_need_nothing_that_a_newcomer_lacks():
    for _, command in FIRST_STEPS:
        arguments, _ = parsed(command)
        given = {name: getattr(arguments, name, None) for name in ("model", "images", "weights")}
        assert set(given.values()) <= {"bundled", None}
        assert getattr(arguments, "calibration", None) in ("bundled", None)


def test_first_steps_follow_from_each_other():
    (extract, _), (evaluate, _) = (parsed(command) for _, command in FIRST_STEPS[:2])
    assert evaluate.run == extract.out


def test_systems_in_examples_exist():
    listed = [parsed(command)[0].systems for _, command in GUIDES["compare"].examples]
    named = [name for names in listed if names for name in names]
    assert named
    assert set(named) <= set(SYSTEMS)


def test_moee_alone_is_a_question_for_help(capsys):
    assert cli.main([]) == 0
    assert capsys.readouterr().out == printed(capsys, "--help")


def test_the_list_of_commands_has_a_line_for_each(capsys):
    out = printed(capsys, "--help")
    for name, guide in GUIDES.items():
        assert re.search(rf"^  {name} +{re.escape(guide.line)}$", out, re.M)
    assert [out.index(command) for _, command in FIRST_STEPS] == sorted(
        out.index(command) for _, command in FIRST_STEPS
    )
    assert set(GUIDES) == set(COMMANDS)


@pytest.mark.parametrize("name", GUIDES)
def test_the_help_of_a_command_explains_it_every_option_and_examples(name, capsys):
    out = printed(capsys, name, "--help")
    told = " ".join(out.replace("\\\n", " ").split())
    assert GUIDES[name].description in told
    assert all(" ".join(command.split()) in told for _, command in GUIDES[name].examples)
    usage, options = out.split("\n\n", 1)
    for option in re.findall(r"--[a-z-]+", usage):
        assert re.search(rf"{option}\b[^\n]*\s+\S", options), option
    assert max(map(len, out.splitlines())) <= 100


def test_defaults_of_fine_tuning_are_those_that_are_told():
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneConfig)}
    for name, (kind, told) in FINETUNE_OPTIONS.items():
        found = re.search(r"\(default: (.+)\)$", told)
        assert (kind(found[1]) if found else None) == defaults[name]


def test_the_choices_are_those_of_the_configurations():
    """They are listed again, because the configurations need the heavy libraries."""
    named = {
        "recipe": RECIPES, "reduce": REDUCTIONS, "noise": NOISE_POLICIES,
        "attention": CHOICES["attention"], "dense_tokens": TOKEN_KINDS, "router": ROUTERS,
        "augmentation": AUGMENTATIONS, "precision": PRECISIONS,
    }  # fmt: skip
    for name, choices in named.items():
        tuned = name in FINETUNE_OPTIONS
        command = "moee finetune runs/first --out new" if tuned else "moee extract --out new"
        for choice in choices:
            arguments, _ = parsed(f"{command} --{name.replace('_', '-')} {choice}")
            assert getattr(arguments, name) in (choice, (choice,))


def test_the_version_is_that_of_the_package(capsys):
    from importlib.metadata import version

    assert printed(capsys, "--version") == f"moee {version('moee-analysis')}\n"
