"""What measures refuse, each before anything is computed."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
from torch import nn

from moee_analysis import measure
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.comparison import Contest, compare
from moee_analysis.measure.evaluation.evaluate import evaluate
from moee_analysis.measure.evaluation.latency import choose_batches
from moee_analysis.measure.knockout.intervention import knocked_out, mean_outputs, removed
from moee_analysis.measure.routing.bootstrap import repeat
from moee_analysis.moe.layer import moe_layers
from moee_analysis.moe.routers import ConstantRouter
from moee_analysis.training.config import FinetuneConfig, SupervisedConfig
from tests.helpers.colours import colour_model, coloured_images
from tests.helpers.images import toy_images
from tests.helpers.models import toy_kinds, toy_moe, toy_vit
from tests.helpers.routes import drawn_routes, made_routes, masked_images
from tests.helpers.runs import best, quick

DENSE, MOE = toy_vit(), toy_moe(toy_vit())
SEVERAL, NO_HEAD = toy_moe(toy_vit()), toy_vit()
moe_layers(SEVERAL)[0].router = ConstantRouter([0, 1])
NO_HEAD.head = nn.Identity()
CALIBRATION, IMAGES = toy_images(12), toy_images(36).take(range(12, 36))
NONE, CONTEST = IMAGES.take([]), Contest(DENSE, CALIBRATION, IMAGES, "smoke")
COLOURED, OTHERS = coloured_images(*range(20)), coloured_images(*range(100, 116))
ROUTES, MASKED = drawn_routes(classes=4, each=10), masked_images(40)
LONE = made_routes(experts={0: np.eye(5, 17, dtype=int)}, labels=[0, 0, 1, 1, 2])
NO_GRID = {0: (1, 16), 1: (0, 0)}
FEW = pd.DataFrame({"group": range(3), "kind": "class", "what": "removed"})
FAMILIES = {f"class {number}": "family" for number in range(3)}
BEST, PAPER = best(macs_reduction=0.1), quick(macs_reduction=0.1)
OF_EXPERTS = measure.sizes, measure.neurons, measure.overlap
OF_CLASSES = measure.class_routing, measure.specificity
STARTS = {"start": lambda seed: toy_vit(seed=seed)}


def tried(measured, what, images=IMAGES, **options):
    return measured(DENSE, CALIBRATION, images, what, store="unused", **options)


def fine_tuning(runs, images=IMAGES, **options):
    config = FinetuneConfig()
    return measure.fine_tuning(runs, CALIBRATION, images, config, store="unused", **options)


def trainings(starts, seeds, images=IMAGES):
    config, options = SupervisedConfig(), {"seeds": seeds, "store": "unused"}
    return measure.trainings(starts, CALIBRATION, images, config, **options)


def relatedness(classes, model):
    a, b = np.indices((classes, classes)).reshape(2, -1)
    table = pd.DataFrame({"system": "MoEE", "layer": 0, "class_index_a": a, "class_index_b": b})
    return measure.class_relatedness(table.assign(js=1.0), model, permutations=2)


def knock_out(model=MOE, calibration=CALIBRATION, **options):
    return measure.knock_out(model, IMAGES, calibration, **options)


def unseen(images=COLOURED, **options):
    return measure.parts_unseen(colour_model(), images, OTHERS, **options)


REFUSED = {
    "two recipes; found 'best' twice": lambda: tried(measure.ablation, BEST, other="best"),
    "bind only the MACs": lambda: tried(measure.ablation, replace(BEST, params_reduction=0.1)),
    "a variant that is tried": lambda: tried(measure.sweeps, {"s": {"m": {1: DENSE}}}, beside=BEST),
    "at least one variant": [
        lambda: tried(measure.sweeps, {}), lambda: tried(measure.variants, {}),
    ],
    "variants among dense; found 'cake'": [
        lambda: tried(measure.variants, {"dense": DENSE}, beside={"dense": "cake"}),
        lambda: tried(measure.variants, {"dense": DENSE}, beside={"cake": "dense"}),
    ],
    "among MoEE": lambda: measure.accuracy({"MoEE": DENSE}, IMAGES, reference="dense"),
    "at least one model": lambda: measure.accuracy({}, IMAGES),
    "at least one image": [
        lambda: measure.accuracy(DENSE, NONE), lambda: measure.latency({}, NONE, reference=DENSE),
        lambda: measure.router_regret(None, NONE, {}), lambda: measure.routes(MOE, NONE),
        lambda: mean_outputs(MOE, NONE),
        lambda: tried(measure.variants, {"dense": DENSE}, NONE),
    ],
    "a run or more": [
        lambda: measure.architectures({}, IMAGES), lambda: fine_tuning({}),
        lambda: fine_tuning({"none": []}), lambda: fine_tuning({"one": [None]}, seeds=()),
    ],
    "a model or more": lambda: measure.architecture_variants(
        {}, CALIBRATION, IMAGES, {"paper": PAPER}, store="unused"
    ),
    "systems among MoEE, paper": lambda: compare(CONTEST, systems=["MoEE"]),
    "a budget and a seed": [
        lambda: compare(CONTEST, seeds=()), lambda: compare(CONTEST, macs_reductions=()),
    ],
    "used for calibration": [
        lambda: Contest(DENSE, IMAGES.take(range(10)), IMAGES),
        lambda: knock_out(calibration=IMAGES.take([3])), lambda: unseen(OTHERS),
    ],
    "not trained on": [
        lambda: fine_tuning({"one": [None]}, CALIBRATION),
        lambda: trainings(STARTS, (0,), CALIBRATION),
    ],
    "a start or more": [
        lambda: trainings({}, (0,)), lambda: trainings(STARTS, ()),
        lambda: trainings(STARTS, (1, 1)),
    ],
    "toaster": lambda: evaluate(None, IMAGES, device="toaster"),
    "37 images for a batch": lambda: choose_batches(IMAGES, 37, DENSE),
    "4 experts": lambda: measure.macs(
        MOE, routes=measure.routes(toy_moe(toy_vit(), n_experts=3), IMAGES)
    ),
    "resamples as a whole number": lambda: knock_out(resamples=0),
    "family of every class": lambda: knock_out(families={"ant": "insect"}),
    "at least four classes": [lambda: measure.use_and_need(FEW), lambda: relatedness(3, DENSE)],
    "linear classifier": lambda: relatedness(5, NO_HEAD),
    "images with part masks": lambda: unseen(toy_images(4)),
    "only the bundled scenes": lambda: measure.modularity(ROUTES, toy_images(4)),
    "a part that 999 patches show": lambda: unseen(least=999),
    "permutations or resamples as a whole number": lambda: repeat(len, times=0, seed=0),
    "none of class 3": lambda: measure.class_distance(ROUTES, families=FAMILIES),
    "one of class 2": lambda: measure.class_distance(LONE, classes=["class 2", "class 1"]),
    "no image of pug": [partial(each, ROUTES, classes=["pug"]) for each in OF_CLASSES],
    "images to route": [lambda: measure.class_routing(MOE), lambda: measure.routing(MOE)],
    "sequence of routes": lambda: measure.class_routing([]),
    "only dense layers": [
        *(partial(each, DENSE) for each in OF_EXPERTS), lambda: knock_out(DENSE),
    ],
    "before the last block": lambda: measure.parts_unseen(DENSE, COLOURED, OTHERS),
    "routers have centres": [
        lambda: measure.similarity(DENSE), lambda: measure.similarity(toy_kinds(toy_vit())),
    ],
    "routes of 80": lambda: measure.modularity(drawn_routes(each=20), MASKED),
    "one expert per token": [
        lambda: measure.modularity(replace(ROUTES, experts={}), MASKED),
        lambda: measure.typical(MOE, IMAGES, replace(ROUTES, experts={})),
        lambda: knock_out(SEVERAL),
    ],
    "known places": lambda: measure.modularity(replace(ROUTES, grid=NO_GRID), MASKED),
    "dense VisionTransformer": lambda: measure.routes(DENSE, IMAGES),
    "slots": lambda: measure.contributions(DENSE, IMAGES),
    "layer 9": [
        *(partial(each, ROUTES, layers=[9]) for each in OF_CLASSES),
        *(partial(each, MOE, layers=[9]) for each in OF_EXPERTS), lambda: unseen(layers=[9]),
        lambda: measure.top_patches(MOE, IMAGES, layers=[9]), lambda: knock_out(layers=[9]),
        lambda: measure.routes(DENSE, IMAGES, routers={9: ConstantRouter()}),
        lambda: mean_outputs(MOE, IMAGES, layers=[9]),
        lambda: knocked_out(MOE, 9, removed(0), None).__enter__(),
    ],
}  # fmt: skip
CALLS = [
    (message, call)
    for message, calls in REFUSED.items()
    for call in (calls if isinstance(calls, list) else [calls])
]


@pytest.mark.parametrize(("message", "call"), CALLS)
def test_what_cannot_be_measured_is_refused(message, call):
    with pytest.raises(MoeeError, match=message):
        call()


def test_routers_that_do_not_fit_are_named(small_run):
    with pytest.raises(MoeeError, match=r"routers for some of the routed layers.*found none"):
        measure.router_regret(small_run, IMAGES, {})
    with pytest.raises(MoeeError, match=r"found strange for \[99\]"):
        measure.router_regret(small_run, IMAGES, {"strange": {99: ConstantRouter()}})
