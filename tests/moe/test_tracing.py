"""What deploys a model traces it once: the mixture beside the dense model, for any batch."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

from moee_analysis.extraction.pipeline import extract
from moee_analysis.moe.layer import moe_layers
from tests.helpers.images import toy_images
from tests.helpers.models import SMALL_CONVNEXT, lively, pixels_of, toy_swin
from tests.helpers.runs import best, quick

CASES = {
    "paper": (lively, quick()),
    "best": (lively, best(macs_reduction=0.2)),
    "low rank": (lively, best(macs_reduction=0.3, attention="low_rank")),
    "ConvNeXt": (lambda: lively(SMALL_CONVNEXT), quick()),
    "Swin": (toy_swin, quick()),
}


@pytest.fixture(scope="module", params=CASES)
def run(request):
    make, config = CASES[request.param]
    return extract(make(), toy_images(24), config)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_a_trace_routes_images_that_it_has_not_seen(run):
    for model in (run.dense(), run.model):
        with torch.no_grad():
            traced = torch.jit.trace(model, pixels_of(model, count=2), check_trace=False)
            for seed, count in ((1, 2), (2, 5), (3, 1)):
                x = pixels_of(model, count=count, seed=seed)
                torch.testing.assert_close(traced(x), model(x))


def test_an_export_routes_images_that_it_has_not_seen(run):
    batch = Dim("images", min=1, max=64)
    for model in (run.dense(), run.model):
        x = pixels_of(model, count=2)
        exported = export(model, (x,), dynamic_shapes=({0: batch},)).module()
        with torch.no_grad():
            for seed, count in ((1, 2), (2, 5), (3, 1)):
                x = pixels_of(model, count=count, seed=seed)
                torch.testing.assert_close(exported(x), model(x))


def test_images_of_a_trace_use_different_experts(run):
    used = []
    for layer in moe_layers(run.model).values():
        hook = layer.router.register_forward_hook(lambda _m, _a, out: used.append(out.unique()))
        with torch.no_grad():
            run.model(pixels_of(run.model, count=3))
        hook.remove()
    assert max(map(len, used)) > 1
