"""What every command does with its arguments; each returns the exit code.

The parser does without its heavy libraries; those of a single command are imported there.
"""

from argparse import Namespace
from dataclasses import fields, replace
from typing import Any

from torch import nn

import moee_analysis as moee
from moee_analysis.cli import printing
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import preset_named, recipe_named
from moee_analysis.extraction.run import Extraction, check_target
from moee_analysis.models.class_names import name_by_folders, read_class_names
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import check_device
from moee_analysis.utils import progress
from moee_analysis.utils.distributed import local_device, rank, together
from moee_analysis.utils.environment import store_folder
from moee_analysis.utils.storage.files import new_file, write_json
from moee_analysis.utils.storage.upkeep import entries, prune

MODEL_ARGUMENTS = ("img_size", "in_chans")  # options that are those of ``timm.create_model``
EXPORTED = 16  # images that an exported model is checked on
BELOW = 3  # exit code of a report in which a number is below its ``--fail-under``


def extract(arguments: Namespace) -> int:
    """Take a model apart and save the run."""
    bound = arguments.params_reduction is not None
    clustering = recipe_named(arguments.recipe, bound=bound)["clustering"]
    if arguments.reduce:
        clustering = replace(clustering, reduce=arguments.reduce)
    config = moee.ExtractConfig(**_settings(arguments, moee.ExtractConfig), clustering=clustering)
    sizes = {"memory": arguments.memory_gb, "disk": arguments.disk_gb}
    limits = moee.Limits(**{name: 1e9 * size for name, size in sizes.items() if size is not None})
    given = {"split": "calibration", "strict": arguments.strict}
    with together():
        check_target(arguments.out)
        model = _model(arguments, local_device(arguments.device))
        check_target(arguments.out, wanted=sum(t.nbytes for t in model.state_dict().values()))
        images = moee.load_images(arguments.calibration, **given)
        name_by_folders(model, images.classes)
        run = moee.extract(model, images, config, store=arguments.store, limits=limits)
        if rank() == 0:
            run.save(arguments.out)
            print(printing.layers_text(run))
            progress.tell(f"saved to {arguments.out}")
    return 0


def evaluate(arguments: Namespace) -> int:
    """Compare a run with its dense model."""
    from moee_analysis.measure.evaluation.evaluate import evaluate as evaluate_run

    images = moee.load_images(arguments.images, strict=arguments.strict)
    run = _run(arguments, images)
    numbers = evaluate_run(run, images, weights=arguments.weights, device=arguments.device)
    if arguments.json:
        write_json(arguments.json, numbers)
    print(printing.numbers_text(numbers))
    return 0


def finetune(arguments: Namespace) -> int:
    """Train a run towards its dense model."""
    config = moee.FinetuneConfig(**_settings(arguments, moee.FinetuneConfig))
    given = {"split": "train", "limit": arguments.limit, "strict": arguments.strict}
    with together():
        device = local_device(arguments.device)
        check_device(device)
        run = moee.load(arguments.run)
        run.model.to(device)
        images = moee.load_images(arguments.images, **given)
        tuned = moee.finetune(run, images, config, out=arguments.out, weights=arguments.weights)
        if rank() == 0:
            curve = moee.plots.history(tuned.history, caption=printing.tuned_text(tuned))
            with new_file(arguments.out / "curve.png") as partial:
                curve.savefig(partial, format="png")
            print(printing.tuned_text(tuned))
            progress.tell(f"saved to {arguments.out}")
    return 0 if tuned.finite else 1


def compare(arguments: Namespace) -> int:
    """Set all systems side by side."""
    from moee_analysis.baselines.registry import systems_named
    from moee_analysis.measure.evaluation import comparison

    systems_named(arguments.systems)
    model = _model(arguments, arguments.device)
    sizes, strict = preset_named(arguments.preset), arguments.strict
    given = {"split": "calibration", "limit": sizes.calibration_images, "strict": strict}
    calibration = moee.load_images(arguments.calibration, **given)
    images = moee.load_images(arguments.images, limit=sizes.evaluation_images, strict=strict)
    name_by_folders(model, images.classes)
    contest = comparison.Contest(
        model, calibration, images, arguments.preset, arguments.store, sizes.resamples,
        latency=not arguments.no_latency,
    )  # fmt: skip
    rows = comparison.compare(
        contest, macs_reductions=arguments.macs_reduction, systems=arguments.systems,
        seeds=range(arguments.seed, arguments.seed + arguments.seeds),
    )  # fmt: skip
    if arguments.json:
        write_json(arguments.json, rows)
    print(printing.comparison_text(comparison.comparison_table(rows)))
    return 0


def export(arguments: Namespace) -> int:
    """Write the model of a run as a file for other programs."""
    from moee_analysis.models.exporting import check_packages, export_model

    check_packages(arguments.format)
    images = moee.load_images(arguments.images, limit=EXPORTED)
    model = moee.load(arguments.run).model
    (x,) = images.batches(model, batch_size=EXPORTED)
    progress.tell_progress(f"tracing the model, then comparing it on {len(x)} images")
    far = export_model(model, like(x, model), arguments.out, form=arguments.format)
    size = arguments.out.stat().st_size / 1e6
    progress.tell(f"saved to {arguments.out} ({size:.1f} MB)")
    print(f"outputs differ from the model's by {far.median():.1e} of their size, "
          f"{far.max():.1e} at most ({len(x)} images)")  # fmt: skip
    return 0


def atlas(arguments: Namespace) -> int:
    """Write the atlas of a run's experts."""
    from moee_analysis.report.atlas import write_atlas

    check_device(arguments.device)
    images = moee.load_images(arguments.images, limit=arguments.limit, strict=arguments.strict)
    run = _run(arguments, images)
    run.model.to(arguments.device)
    try:
        dense = run.dense(weights=arguments.weights).to(arguments.device)
    except MoeeError as error:
        if arguments.weights:
            raise
        dense = None
        print(f"without the dense model: {error}")
    page = write_atlas(run, images, arguments.out, dense=dense)
    progress.tell(f"atlas: {page} ({page.stat().st_size / 1e6:.1f} MB)")
    if arguments.open:
        progress.open_page(page)
    return 0


def report(arguments: Namespace) -> int:
    """Run notebooks and write their pages."""
    from moee_analysis.report.notebook.bench import check_report
    from moee_analysis.report.pages.site import INDEX
    from moee_analysis.report.runner import run_notebooks
    from moee_analysis.report.runner.choose import check_parameters, own_notebooks
    from moee_analysis.report.summary.summary import read_summary

    names = ("model", "weights", "calibration", "images", "seed", *MODEL_ARGUMENTS)
    given = _given(arguments, *names) | {"class_file": arguments.classes} | dict(arguments.set)
    options = {"notebooks": arguments.only, "gates": arguments.fail_under}
    options |= _given(arguments, "out", "preset", "jobs", "against")
    for notebook in arguments.only or own_notebooks():
        check_parameters(notebook, given)
    check_report(given | {"preset": arguments.preset})
    outcomes = run_notebooks.report(given, **options)
    if arguments.open:
        progress.open_page(arguments.out / INDEX)
    if not all(outcome.ok for outcome in outcomes):
        return 1
    gates = read_summary(arguments.out)["gates"] if arguments.fail_under else []
    return 0 if all(gate["met"] for gate in gates) else BELOW


def store(arguments: Namespace) -> int:
    """List what a store holds, or remove what was not used for longest."""
    root = arguments.store or store_folder()
    if arguments.prune is None:
        print(printing.store_text(root, entries(root)))
    else:
        print(printing.pruned_text(*prune(root, arguments.prune), most=arguments.prune))
    return 0


def _settings(arguments: Namespace, config: type) -> dict[str, Any]:
    """The fields of a ``config`` that are options."""
    names = [field.name for field in fields(config) if hasattr(arguments, field.name)]
    return _given(arguments, *names)


def _given(arguments: Namespace, *names: str) -> dict[str, Any]:
    return {name: getattr(arguments, name) for name in names}


def _model(arguments: Namespace, device: str) -> nn.Module:
    """The dense model that the options name."""
    given = _given(arguments, "weights", "classes", *MODEL_ARGUMENTS)
    return moee.load_model(arguments.model, device=device, **given)


def _run(arguments: Namespace, images: ImageSet) -> Extraction:
    """The run, with the names of its classes that are given, or those of the class folders."""
    run = moee.load(arguments.run)
    if arguments.classes:
        moee.name_classes(run.model, read_class_names(arguments.classes))
    name_by_folders(run.model, images.classes)
    return run
