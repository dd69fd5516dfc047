"""What deploys a model traces it once: the mixture beside the dense model, for any batch."""

from collections import defaultdict

import pytest
import torch
from torch.export import Dim, export

from moee_analysis.extraction.pipeline import extract
from moee_analysis.models.capture import watch
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import merge_tokens
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import (
    SMALL_CONVNEXT,
    lively,
    pixels_of,
    toy_kinds,
    toy_moe,
    toy_swin,
    toy_vit,
)
from tests.helpers.runs import best

MERGED = merge_tokens(toy_vit(), (3, 0, 4), lambda _: WardCosts(by_importance=True))
LOW_RANK = best(macs_reduction=0.3, attention="low_rank")
MODELS = {
    "dense": lambda: toy_vit(depth=1),
    "paper": lambda: toy_moe(toy_vit(depth=2), layers={0}),
    "best, low rank": lambda: extract(toy_vit(depth=2), toy_images(12), LOW_RANK).model,
    "tokens that merge": lambda: MERGED,
    "ConvNeXt": lambda: toy_moe(lively(SMALL_CONVNEXT), layers={0, 3}),
    "Swin": lambda: toy_moe(toy_swin()),
}


def jit(model, x, _folder):
    return torch.jit.trace(model, x, check_trace=False)


def exported(model, x, folder):
    program = export(model, (x,), dynamic_shapes=({0: Dim("images", min=1, max=64)},))
    torch.export.save(program, folder / "model.pt2")
    return torch.export.load(folder / "model.pt2").module()


def compiled(model, _x, _folder):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def check_trace(model, trace, folder):
    used = defaultdict(set)
    routers = {index: layer.router for index, layer in moe_layers(model).items()}
    with torch.no_grad():
        traced = trace(model, pixels_of(model, count=2), folder)
        for seed, count in ((1, 2), (2, 5), (3, 1)):
            x = pixels_of(model, count=count, seed=seed)
            found = traced(x)
            with watch(routers, lambda i, out: used[i].update(out.flatten().tolist()), "outputs"):
                torch.testing.assert_close(found, model(x))
    assert not routers or max(map(len, used.values())) > 1


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("trace", [jit, exported])
def test_a_trace_routes_images_that_it_has_not_seen(model, trace, tmp_path):
    check_trace(model, trace, tmp_path)


@pytest.mark.parametrize(
    "make",
    [MODELS["paper"], lambda: toy_kinds(toy_vit(depth=1)), MODELS["tokens that merge"]],
)
def test_compiling_needs_one_graph(make, tmp_path):
    check_trace(make(), compiled, tmp_path)
