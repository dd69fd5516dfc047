"""What the command line takes: every command with its options, their defaults and units."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from moee_analysis.cli import commands, values
from moee_analysis.cli.finetune_options import FINETUNE_OPTIONS
from moee_analysis.cli.help import GUIDES, WHAT_IT_IS, description_of, examples_of, first_steps
from moee_analysis.cli.parsing import Help, Parser
from moee_analysis.extraction.config.presets import PRESETS
from moee_analysis.utils.versions import own_version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

LARGEST_SIZE = 10_000
"""More pixels of a side, or channels, no model here has."""

LARGEST_GB = 1e9
"""As ``Limits`` have it."""


def command_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; ``command`` is None where none is given."""
    parser = Parser(prog="moee", description=WHAT_IT_IS, epilog=first_steps(), formatter_class=Help)
    parser.add_argument("--version", action="version", version=f"moee {own_version()}")
    parser.set_defaults(command=None, passes_on=False, parser=parser)
    listed = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, (add_options, run) in COMMANDS.items():
        command = listed.add_parser(
            name, help=GUIDES[name].line, description=description_of(name),
            epilog=examples_of(name), formatter_class=Help,
        )  # fmt: skip
        add_options(command)
        command.set_defaults(command=run, parser=command)
    return parser


def _extract_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", required=True, type=values.new_folder, help="new folder for the run"
    )
    _model_options(parser)
    _images(
        parser, "--calibration", "images to calibrate on: folder of class folders, or 'bundled'"
    )
    _budget_options(parser.add_argument_group("how much to save"))
    _method_options(parser.add_argument_group("how"))
    _compute_options(parser)
    _resource_options(parser.add_argument_group("memory and disk"))


def _budget_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--macs-reduction", type=values.share, metavar="SHARE",
        help="share of all MACs to save, such as 0.28; best without any budget takes 0.28",
    )  # fmt: skip
    group.add_argument(
        "--params-reduction", type=values.share, metavar="SHARE",
        help="share of the stored parameters to save; not with the recipe paper",
    )  # fmt: skip
    group.add_argument(
        "--variance-kept", type=values.share, metavar="SHARE",
        help="the paper's p, in place of --macs-reduction; paper without any budget takes 0.9",
    )  # fmt: skip


def _method_options(group: argparse._ArgumentGroup) -> None:
    _choice(
        group, "--recipe", ("paper", "best"), default="paper",
        told="paper: MoEE as published; best: keeps most accuracy",
    )  # fmt: skip
    _choice(
        group, "--reduce", ("umap", "pca", "none"),
        told="before clustering; none is the paper taken literally; else the recipe's",
    )  # fmt: skip
    _choice(
        group, "--noise", ("reroute", "drop", "rest"), default="reroute",
        told="tokens in no cluster: routed like others, left out, or an expert of their own",
    )  # fmt: skip
    group.add_argument(
        "--dense-tokens", metavar="KINDS", type=values.several("cls", "dist", "register", "patch"),
        help="kinds that keep all neurons, with commas: cls,dist,register,patch; else none",
    )  # fmt: skip
    _choice(
        group, "--attention", ("dense", "read", "low_rank"),
        told="left as it is; computed only where it is read; smaller heads too; else the recipe's",
    )  # fmt: skip


def _evaluate_options(parser: argparse.ArgumentParser) -> None:
    _run_and_images(parser, "images to compare on")
    _json_option(parser, "write all numbers there")
    _classes_option(parser, "else those that were saved with the run")
    _loading_options(parser)


def _finetune_options(parser: argparse.ArgumentParser) -> None:
    _run_and_images(parser, "images to train on")
    parser.add_argument(
        "--out", required=True, type=values.new_folder, help="new folder for the tuned run"
    )
    parser.add_argument(
        "--limit", type=values.whole(), metavar="N", help="at most so many images; else all"
    )
    group = parser.add_argument_group("training")
    for name, (kind, told) in FINETUNE_OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=told)
    _loading_options(parser)


def _compare_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _images(
        parser, "--calibration", "images to calibrate on: folder of class folders, or 'bundled'"
    )
    _images(parser, "--images", "other images, to compare on")
    parser.add_argument(
        "--macs-reduction", type=values.part, nargs="+", default=[0.28], metavar="SHARE",
        help="shares of all MACs to save, one comparison for each (default: 0.28)",
    )  # fmt: skip
    parser.add_argument(
        "--systems", type=values.name, nargs="+", metavar="NAME",
        help="such as 'MoEE, best'; else all systems",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=values.whole(most=1000), default=1, metavar="N",
        help="how many seeds, from --seed on",
    )  # fmt: skip
    parser.add_argument("--no-latency", action="store_true", help="measure no times")
    _json_option(parser, "write a row per system there")
    parser.add_argument("--store", type=values.store, help="folder that keeps tokens and clusters")
    _compute_options(parser)


def _atlas_options(parser: argparse.ArgumentParser) -> None:
    _run_and_images(parser, "images to show")
    parser.add_argument(
        "--out", required=True, type=values.new_file, metavar="FILE", help="the HTML file"
    )
    parser.add_argument(
        "--limit", type=values.whole(), default=200, metavar="N",
        help="at most so many, even over the classes",
    )  # fmt: skip
    _classes_option(parser, "else those that were saved with the run")
    _open_option(parser)
    _loading_options(parser)


def _report_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    _images(parser, "--images", "images to look at: folder of class folders, or 'bundled'")
    parser.add_argument(
        "--calibration", type=values.images, metavar="DIR",
        help="other images, to calibrate on; else half of --images",
    )  # fmt: skip
    parser.add_argument(
        "--out", default="reports", type=values.new_folder, metavar="DIR",
        help="folder of the report",
    )  # fmt: skip
    _open_option(parser)
    _preset_and_seed(parser)


def _lab_options(parser: argparse.ArgumentParser) -> None:
    parser.usage = "moee lab [-h] [options of jupyter lab ...]"
    parser.set_defaults(passes_on=True)


def _doctor_options(parser: argparse.ArgumentParser) -> None:
    _model_options(parser)
    parser.add_argument(
        "--images", type=values.whole(), metavar="N",
        help="that there are for the run whose cost is told; else as many as the preset takes",
    )  # fmt: skip
    _choice(parser, "--preset", PRESETS, default="small", told="how much compute that run takes")
    parser.add_argument("--json", action="store_true", help="print JSON, for machines")


def _model_options(parser: argparse.ArgumentParser) -> None:
    names = "'bundled', 'bundled_swin', 'bundled_convnext' or a timm model name"
    parser.add_argument("--model", type=values.name, default="bundled", metavar="NAME", help=names)
    parser.add_argument(
        "--weights", type=values.existing_file, metavar="FILE",
        help="a local .safetensors or .pth state dict; else the hub's",
    )  # fmt: skip
    _classes_option(parser, "else those it states, or the class folders if as many")
    parser.add_argument(
        "--img-size", type=values.whole(most=LARGEST_SIZE), metavar="N",
        help="of the images, in pixels; else the model's own",
    )  # fmt: skip
    parser.add_argument(
        "--in-chans", type=values.whole(most=LARGEST_SIZE), metavar="N",
        help="channels of the images; else the model's own",
    )  # fmt: skip


def _classes_option(parser: argparse.ArgumentParser, otherwise: str) -> None:
    parser.add_argument(
        "--classes", type=values.existing_file, metavar="FILE",
        help=f"names of the model's classes, one a line or JSON; {otherwise}",
    )  # fmt: skip


def _images(parser: argparse.ArgumentParser, name: str, told: str) -> None:
    parser.add_argument(name, type=values.images, default="bundled", metavar="DIR", help=told)


def _json_option(parser: argparse.ArgumentParser, told: str) -> None:
    parser.add_argument("--json", type=values.new_file, metavar="FILE", help=told)


def _choice(
    group: argparse._ActionsContainer,
    name: str,
    choices: Iterable[str],
    *,
    told: str,
    default: str | None = None,
) -> None:
    shown = f"{{{','.join(choices)}}}"
    group.add_argument(name, type=values.among(*choices), default=default, metavar=shown, help=told)


def _run_and_images(parser: argparse.ArgumentParser, told: str) -> None:
    parser.add_argument(
        "run", type=values.run_folder, metavar="RUN", help="folder of a run that extract made"
    )
    _images(parser, "--images", f"{told}: folder of class folders, or 'bundled'")


def _loading_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--weights", type=values.existing_file, metavar="FILE",
        help="the dense weights, if they have moved",
    )  # fmt: skip
    _device_and_strict(parser)


def _compute_options(parser: argparse.ArgumentParser) -> None:
    _preset_and_seed(parser)
    _device_and_strict(parser)


def _preset_and_seed(parser: argparse.ArgumentParser) -> None:
    _choice(parser, "--preset", PRESETS, default="small", told="how much compute")
    parser.add_argument(
        "--seed", type=values.seed, default=0, metavar="N", help="of everything that is drawn"
    )


def _device_and_strict(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", type=values.device, default="cpu", help="cpu, cuda, cuda:1, ..."
    )
    parser.add_argument(
        "--strict", action="store_true", help="refuse unreadable images instead of skipping them"
    )


def _open_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--open", action="store_true", help="open it in the browser when finished")


def _resource_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--store", type=values.store, metavar="DIR",
        help="folder that keeps tokens and clusters; with it a killed run goes on where it was",
    )  # fmt: skip
    group.add_argument(
        "--memory-gb", type=values.real(above=0, most=LARGEST_GB), metavar="GB",
        help="for sums over the tokens (default: 4)",
    )  # fmt: skip
    group.add_argument(
        "--disk-gb", type=values.real(least=0, most=LARGEST_GB), metavar="GB",
        help="for recorded tokens; 0 keeps none (default: half of what is free)",
    )  # fmt: skip


def _store_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", type=values.store, metavar="DIR",
        help="folder of the store; else $MOEE_STORE, or the one in the user's cache",
    )  # fmt: skip
    parser.add_argument(
        "--prune", type=values.size, metavar="SIZE",
        help="remove until it holds so much at most, such as 20GB or 500MB; 0 removes all",
    )  # fmt: skip


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], Any], commands.Command]] = {
    "extract": (_extract_options, commands.extract),
    "evaluate": (_evaluate_options, commands.evaluate),
    "finetune": (_finetune_options, commands.finetune),
    "compare": (_compare_options, commands.compare),
    "atlas": (_atlas_options, commands.atlas),
    "report": (_report_options, commands.report),
    "store": (_store_options, commands.store),
    "lab": (_lab_options, commands.lab),
    "doctor": (_doctor_options, commands.doctor),
}
"""Every command: what adds its options, and what runs it."""
