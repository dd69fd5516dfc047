"""The command line: ``moee extract | evaluate | finetune | compare | report | lab``.

Exit codes: 0 done, 1 failed, 2 bad input (told in one line).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from moee_analysis.cli_text import comparison_text, layers_text, numbers_text, tuned_text
from moee_analysis.errors import MoeeError
from moee_analysis.presets import PRESETS, preset_named

if TYPE_CHECKING:
    from moee_analysis.calibration import Limits
    from moee_analysis.clustering import ClusterConfig

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Under torchrun, ``extract`` and ``finetune`` are one command of all processes.
    """
    parser = _parser()
    arguments, others = parser.parse_known_args(argv)
    if others and arguments.command is not _lab:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    arguments.others = others
    try:
        return arguments.command(arguments)
    except MoeeError as error:
        print(f"moee: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("moee: interrupted, nothing half-written was left behind", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="moee", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_extract(commands)
    _add_evaluate(commands)
    _add_finetune(commands)
    _add_compare(commands)
    _add_report(commands)
    lab = commands.add_parser("lab", help="open JupyterLab; passes its options on")
    lab.set_defaults(command=_lab)
    return parser


def _add_extract(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("extract", help="take a model apart into a mixture of experts")
    _model_options(parser)
    parser.add_argument("--calibration", default="bundled", help="folder of class folders")
    parser.add_argument("--out", required=True, type=Path, help="folder for the run")
    parser.add_argument(
        "--recipe", default="paper", help="paper: MoEE as published; best: keeps most accuracy"
    )
    parser.add_argument("--macs-reduction", type=float, help="share of all MACs to save: 0.28")
    parser.add_argument(
        "--params-reduction", type=float, help="share of stored parameters to save; not with paper"
    )
    parser.add_argument("--variance-kept", type=float, help="the paper's p, instead: 0.9")
    parser.add_argument(
        "--reduce", help="before clustering: umap, pca, or none as in the paper; else the recipe's"
    )
    parser.add_argument("--noise", default="reroute", help="noise tokens: reroute, drop or rest")
    parser.add_argument(
        "--dense-tokens", metavar="KINDS", help="kinds that keep all neurons, such as cls,register"
    )
    parser.add_argument(
        "--attention", help="dense; read: only where it is read; low_rank: smaller heads too"
    )
    _compute_options(parser)
    _resource_options(parser)
    parser.set_defaults(command=_extract)


def _add_evaluate(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("evaluate", help="compare a run with its dense model")
    parser.add_argument("run", type=Path, help="folder of a saved run")
    parser.add_argument("--images", default="bundled", help="folder of class folders")
    parser.add_argument("--weights", help="the dense weights, if they have moved")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    parser.add_argument("--strict", action="store_true", help="refuse unreadable images")
    parser.add_argument("--device", default="cpu")
    parser.set_defaults(command=_evaluate)


def _add_finetune(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "finetune", help="train a run towards its dense model",
        description="Trains a run to predict what its dense model predicts; labels are not used. "
        "A command that was killed goes on after its last whole epoch when it is repeated.",
    )  # fmt: skip
    parser.add_argument("run", type=Path, help="folder of a saved run")
    parser.add_argument("--images", default="bundled", help="folder of class folders to train on")
    parser.add_argument("--out", required=True, type=Path, help="new folder for the tuned run")
    parser.add_argument("--limit", type=int, help="at most so many images")
    for name, (kind, told) in FINETUNE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=told)
    parser.add_argument("--weights", help="the dense weights, if they have moved")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strict", action="store_true", help="refuse unreadable images")
    parser.set_defaults(command=_finetune)


FINETUNE_OPTIONS: dict[str, tuple[Callable[[str], object], str]] = {
    "epochs": (int, "passes over the images"),
    "learning_rate": (float, "highest rate of AdamW"),
    "batch_size": (int, "images of a step, over all processes"),
    "accumulate": (int, "parts that a step is computed in, for less memory"),
    "weight_decay": (float, "of AdamW"),
    "block_weight": (float, "of errors of the blocks' outputs, beside the logits"),
    "router": (str, "frozen, straight_through or auxiliary"),
    "augmentation": (str, "none, light or strong"),
    "ema": (float, "decay of a running mean of the weights"),
    "held_out": (float, "share of the images to watch and not to train on"),
    "patience": (int, "epochs without progress that end the training"),
    "precision": (str, "auto, float32 or bfloat16"),
    "seed": (int, "of order, augmentation and held-out images"),
}
"""Settings of ``FinetuneConfig`` that can be given, what they are and what they mean."""


def _add_compare(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "compare", help="set every training-free system side by side at the same MACs",
        description="Converts a model by every training-free system, at the same MACs, and "
        "measures all of them on the same images, with random, constant and oracle routing and "
        "static pruning beside each.",
    )  # fmt: skip
    _model_options(parser)
    parser.add_argument("--calibration", default="bundled", help="folder of class folders")
    parser.add_argument("--images", default="bundled", help="folder of class folders, others")
    parser.add_argument(
        "--macs-reduction", type=float, nargs="+", default=[0.28], help="shares of MACs to save"
    )
    parser.add_argument("--systems", nargs="+", metavar="NAME", help="as they are listed; all")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--no-latency", action="store_true", help="measure no times")
    parser.add_argument("--json", type=Path, help="write the numbers there, a row per system")
    parser.add_argument("--store", type=Path, help="folder that keeps tokens and clusters")
    _compute_options(parser)
    parser.set_defaults(command=_compare)


def _add_report(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("report", help="run every notebook and write an HTML report")
    _model_options(parser)
    parser.add_argument("--calibration", help="folder of class folders")
    parser.add_argument("--images", default="bundled", help="folder of class folders to look at")
    parser.add_argument("--preset", default="small", choices=PRESETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default=Path("reports"), type=Path)
    parser.set_defaults(command=_report)


def _model_options(parser: argparse.ArgumentParser) -> None:
    names = "'bundled', 'bundled_swin', 'bundled_convnext' or a timm model name"
    parser.add_argument("--model", default="bundled", help=names)
    parser.add_argument("--weights", help="a local .safetensors or .pth state dict")


def _compute_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="small", choices=PRESETS, help="how much compute")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--strict", action="store_true", help="refuse unreadable images")


def _resource_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", type=Path, help="folder that keeps tokens and clusters; a killed run goes on"
    )
    parser.add_argument("--memory-gb", type=float, help="for sums over the tokens; default 4")
    parser.add_argument(
        "--disk-gb", type=float, help="for recorded tokens; default half of what is free"
    )


def _extract(arguments: argparse.Namespace) -> int:
    from moee_analysis.distributed import together

    with together():
        return _extract_together(arguments)


def _extract_together(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.distributed import local_device, rank
    from moee_analysis.saving import check_target

    config = moee.ExtractConfig(
        recipe=arguments.recipe,
        macs_reduction=arguments.macs_reduction,
        params_reduction=arguments.params_reduction,
        variance_kept=arguments.variance_kept,
        preset=arguments.preset,
        seed=arguments.seed,
        clustering=_clustering(arguments),
        noise=arguments.noise,
        attention=arguments.attention,
        dense_tokens=tuple(arguments.dense_tokens.split(",")) if arguments.dense_tokens else (),
    )
    check_target(arguments.out)
    device = local_device(arguments.device)
    model = moee.load_model(arguments.model, weights=arguments.weights, device=device)
    images = moee.load_images(arguments.calibration, split="calibration", strict=arguments.strict)
    run = moee.extract(model, images, config, store=arguments.store, limits=_limits(arguments))
    if rank() == 0:
        run.save(arguments.out)
        print(layers_text(run))
        print(f"saved to {arguments.out}")
    return 0


def _limits(arguments: argparse.Namespace) -> Limits:
    from moee_analysis.calibration import Limits

    given = {"memory": arguments.memory_gb, "disk": arguments.disk_gb}
    return Limits(**{name: 1e9 * size for name, size in given.items() if size is not None})


def _clustering(arguments: argparse.Namespace) -> ClusterConfig:
    """The recipe's clustering, reduced as asked for."""
    from moee_analysis.recipes import recipe_named

    bound = arguments.params_reduction is not None
    clustering = recipe_named(arguments.recipe, bound=bound)["clustering"]
    return replace(clustering, reduce=arguments.reduce) if arguments.reduce else clustering


def _evaluate(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.evaluation import evaluate
    from moee_analysis.store import write_json

    if arguments.json:
        _check_file(arguments.json)
    run = moee.load(arguments.run)
    images = moee.load_images(arguments.images, strict=arguments.strict)
    numbers = evaluate(run, images, weights=arguments.weights, device=arguments.device)
    if arguments.json:
        write_json(arguments.json, numbers)
    print(numbers_text(numbers))
    return 0


def _finetune(arguments: argparse.Namespace) -> int:
    from moee_analysis.distributed import together

    with together():
        return _finetune_together(arguments)


def _finetune_together(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.distributed import local_device, rank
    from moee_analysis.models import check_device

    given = {name: getattr(arguments, name) for name in FINETUNE_OPTIONS}
    config = moee.FinetuneConfig(**{name: v for name, v in given.items() if v is not None})
    device = local_device(arguments.device)
    check_device(device)
    run = moee.load(arguments.run)
    run.model.to(device)
    images = moee.load_images(
        arguments.images, split="train", limit=arguments.limit, strict=arguments.strict
    )
    tuned = moee.finetune(run, images, config, out=arguments.out, weights=arguments.weights)
    if rank() == 0:
        curve = moee.plots.history(tuned.history, caption=tuned_text(tuned))
        curve.savefig(arguments.out / "curve.png")
        print(f"{tuned_text(tuned)}\nsaved to {arguments.out}")
    return 0 if tuned.finite else 1


def _compare(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.comparison import Contest, compare
    from moee_analysis.comparison_rows import comparison_table
    from moee_analysis.store import write_json

    if arguments.json:
        _check_file(arguments.json)
    model = moee.load_model(arguments.model, weights=arguments.weights, device=arguments.device)
    sizes, strict = preset_named(arguments.preset), arguments.strict
    calibration = moee.load_images(
        arguments.calibration, split="calibration", limit=sizes.calibration_images, strict=strict
    )
    images = moee.load_images(arguments.images, limit=sizes.evaluation_images, strict=strict)
    contest = Contest(
        model, calibration, images, arguments.preset, arguments.store, sizes.resamples,
        latency=not arguments.no_latency,
    )  # fmt: skip
    rows = compare(
        contest, macs_reductions=arguments.macs_reduction, systems=arguments.systems,
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
    )  # fmt: skip
    if arguments.json:
        write_json(arguments.json, rows)
    print(comparison_text(comparison_table(rows)))
    return 0


def _check_file(path: Path) -> None:
    """Refuse a file that cannot be written before computing what belongs into it."""
    if path.is_dir() or not path.parent.is_dir():
        found = "a folder" if path.is_dir() else f"no folder '{path.parent}'"
        raise MoeeError(f"a place for the file '{path}'", found, "choose another place")


def _report(arguments: argparse.Namespace) -> int:
    from moee_analysis.report import report

    names = ("model", "weights", "calibration", "images", "seed")
    outcomes = report(
        {name: getattr(arguments, name) for name in names},
        out=arguments.out,
        preset=arguments.preset,
    )
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def _lab(arguments: argparse.Namespace) -> int:
    from moee_analysis.report import open_lab

    return open_lab(arguments.others)


if __name__ == "__main__":
    sys.exit(main())
