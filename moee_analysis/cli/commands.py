"""What every command does with its arguments; each returns the exit code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moee_analysis.cli.finetune_options import FINETUNE_OPTIONS
from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    import argparse

    from torch import nn

    from moee_analysis.data.images import ImageSet
    from moee_analysis.extraction.config.clustering import ClusterConfig
    from moee_analysis.extraction.pipeline import Extraction
    from moee_analysis.extraction.record.calibration_set import Limits

MODEL_ARGUMENTS = ("img_size", "in_chans")
"""Options that are arguments of ``timm.create_model``."""

Command = Callable[["argparse.Namespace"], int]


def extract(arguments: argparse.Namespace) -> int:
    """Take a model apart and save the run."""
    from moee_analysis.utils.distributed import together

    with together():
        return _extract_together(arguments)


def _extract_together(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.cli.printing import layers_text
    from moee_analysis.extraction.saving.run_files import check_target
    from moee_analysis.models.class_names import name_by_folders
    from moee_analysis.utils.distributed import local_device, rank
    from moee_analysis.utils.progress import tell

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
        dense_tokens=arguments.dense_tokens or (),
    )
    check_target(arguments.out)
    device = local_device(arguments.device)
    model = _model(arguments, device)
    check_target(arguments.out, wanted=sum(t.nbytes for t in model.state_dict().values()))
    images = moee.load_images(arguments.calibration, split="calibration", strict=arguments.strict)
    name_by_folders(model, images.classes)
    run = moee.extract(model, images, config, store=arguments.store, limits=_limits(arguments))
    if rank() == 0:
        run.save(arguments.out)
        print(layers_text(run))
        tell(f"saved to {arguments.out}")
    return 0


def _model(arguments: argparse.Namespace, device: str) -> nn.Module:
    """The dense model that the options name."""
    from moee_analysis.models.loading import load_model

    return load_model(arguments.model, device=device, **_given(arguments))


def _given(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options say of the dense model, beside its name."""
    return {name: getattr(arguments, name) for name in ("weights", "classes", *MODEL_ARGUMENTS)}


def _named_run(arguments: argparse.Namespace, images: ImageSet) -> Extraction:
    """The run, with the names of its classes that are given, or those of the class folders."""
    from moee_analysis.extraction.pipeline import load
    from moee_analysis.models.class_names import name_by_folders, name_classes, read_class_names

    run = load(arguments.run)
    if arguments.classes:
        name_classes(run.model, read_class_names(arguments.classes))
    name_by_folders(run.model, images.classes)
    return run


def _limits(arguments: argparse.Namespace) -> Limits:
    from moee_analysis.extraction.record.calibration_set import Limits

    given = {"memory": arguments.memory_gb, "disk": arguments.disk_gb}
    return Limits(**{name: 1e9 * size for name, size in given.items() if size is not None})


def _clustering(arguments: argparse.Namespace) -> ClusterConfig:
    """The recipe's clustering, reduced as asked for."""
    from moee_analysis.extraction.config.recipes import recipe_named

    bound = arguments.params_reduction is not None
    clustering = recipe_named(arguments.recipe, bound=bound)["clustering"]
    return replace(clustering, reduce=arguments.reduce) if arguments.reduce else clustering


def evaluate(arguments: argparse.Namespace) -> int:
    """Compare a run with its dense model."""
    import moee_analysis as moee
    from moee_analysis.cli.printing import numbers_text
    from moee_analysis.measure.evaluation.evaluate import evaluate as evaluated
    from moee_analysis.utils.storage.files import write_json

    images = moee.load_images(arguments.images, strict=arguments.strict)
    run = _named_run(arguments, images)
    numbers = evaluated(run, images, weights=arguments.weights, device=arguments.device)
    if arguments.json:
        write_json(arguments.json, numbers)
    print(numbers_text(numbers))
    return 0


def finetune(arguments: argparse.Namespace) -> int:
    """Train a run towards its dense model."""
    from moee_analysis.utils.distributed import together

    with together():
        return _finetune_together(arguments)


def _finetune_together(arguments: argparse.Namespace) -> int:
    import moee_analysis as moee
    from moee_analysis.cli.printing import tuned_text
    from moee_analysis.models.loading import check_device
    from moee_analysis.utils.distributed import local_device, rank
    from moee_analysis.utils.progress import tell
    from moee_analysis.utils.storage.files import new_file

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
        with new_file(arguments.out / "curve.png") as partial:
            curve.savefig(partial, format="png")
        print(tuned_text(tuned))
        tell(f"saved to {arguments.out}")
    return 0 if tuned.finite else 1


def compare(arguments: argparse.Namespace) -> int:
    """Set all systems side by side."""
    import moee_analysis as moee
    from moee_analysis.baselines.registry import systems_named
    from moee_analysis.cli.printing import comparison_text
    from moee_analysis.extraction.config.presets import preset_named
    from moee_analysis.measure.evaluation.comparison import Contest
    from moee_analysis.measure.evaluation.comparison import compare as compared
    from moee_analysis.measure.evaluation.comparison_table import comparison_table
    from moee_analysis.models.class_names import name_by_folders
    from moee_analysis.utils.storage.files import write_json

    systems_named(arguments.systems)
    model = _model(arguments, arguments.device)
    sizes, strict = preset_named(arguments.preset), arguments.strict
    calibration = moee.load_images(
        arguments.calibration, split="calibration", limit=sizes.calibration_images, strict=strict
    )
    images = moee.load_images(arguments.images, limit=sizes.evaluation_images, strict=strict)
    name_by_folders(model, images.classes)
    contest = Contest(
        model, calibration, images, arguments.preset, arguments.store, sizes.resamples,
        latency=not arguments.no_latency,
    )  # fmt: skip
    rows = compared(
        contest, macs_reductions=arguments.macs_reduction, systems=arguments.systems,
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
    )  # fmt: skip
    if arguments.json:
        write_json(arguments.json, rows)
    print(comparison_text(comparison_table(rows)))
    return 0


def atlas(arguments: argparse.Namespace) -> int:
    """Write the atlas of a run's experts."""
    import moee_analysis as moee
    from moee_analysis.models.loading import check_device
    from moee_analysis.report.atlas import write_atlas
    from moee_analysis.utils.progress import tell
    from moee_analysis.utils.web_browser import open_page

    check_device(arguments.device)
    images = moee.load_images(arguments.images, limit=arguments.limit, strict=arguments.strict)
    run = _named_run(arguments, images)
    run.model.to(arguments.device)
    page = write_atlas(run, images, arguments.out, dense=_dense(run, arguments))
    tell(f"atlas: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if arguments.open:
        open_page(page)
    return 0


def _dense(run: Extraction, arguments: argparse.Namespace) -> nn.Module | None:
    """The dense model of a run, None if it is not there any more."""
    try:
        return run.dense(weights=arguments.weights).to(arguments.device)
    except MoeeError as error:
        if arguments.weights:
            raise
        print(f"without the dense model: {error}")
        return None


def report(arguments: argparse.Namespace) -> int:
    """Run all notebooks and write their pages."""
    from moee_analysis.report.notebook.image_sets import check_report
    from moee_analysis.report.runner.run_notebooks import INDEX
    from moee_analysis.report.runner.run_notebooks import report as reported
    from moee_analysis.utils.web_browser import open_page

    names = ("model", "weights", "calibration", "images", "seed", *MODEL_ARGUMENTS)
    given = {name: getattr(arguments, name) for name in names} | {"class_file": arguments.classes}
    check_report(given | {"preset": arguments.preset})
    outcomes = reported(
        given,
        out=arguments.out,
        preset=arguments.preset,
    )
    if arguments.open:
        open_page(arguments.out / INDEX)
    return 0 if all(outcome.ok for outcome in outcomes) else 1


def store(arguments: argparse.Namespace) -> int:
    """List what a store holds, or remove what was not used for longest."""
    from moee_analysis.cli.store_text import pruned_text, store_text
    from moee_analysis.utils.paths import store_folder
    from moee_analysis.utils.storage.upkeep import entries, prune

    root = arguments.store or store_folder()
    if arguments.prune is None:
        print(store_text(root, entries(root)))
    else:
        print(pruned_text(prune(root, arguments.prune), arguments.prune))
    return 0


def lab(arguments: argparse.Namespace) -> int:
    """Open JupyterLab until it is closed."""
    from moee_analysis.report.runner.run_notebooks import open_lab

    return open_lab(arguments.others)


def doctor(arguments: argparse.Namespace) -> int:
    """Say what works here and what a run would cost."""
    from moee_analysis.cli.doctor import examined
    from moee_analysis.cli.doctor_text import diagnosis_json, diagnosis_text

    diagnosis = examined(
        arguments.model, images=arguments.images, preset=arguments.preset, **_given(arguments)
    )
    print(diagnosis_json(diagnosis) if arguments.json else diagnosis_text(diagnosis))
    return 0 if diagnosis.ok else 1
