"""Every family of timm whose MLPs can be taken apart, from images to a saved mixture of experts."""

import math
from copy import deepcopy
from functools import cache

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from moee_analysis import measure
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.extraction.run import load
from moee_analysis.measure.routing.routes import routes
from moee_analysis.models.attention import plain_attentions, reduced_attentions
from moee_analysis.models.fingerprints import fingerprint
from moee_analysis.models.loading import find_mlps
from moee_analysis.models.macs import count, moe_macs
from moee_analysis.moe.layer import MoeMlp, moe_layers, moe_names, replace_module
from moee_analysis.moe.routers import CosineRouter
from tests.helpers.families import FAMILIES, small
from tests.helpers.images import toy_images
from tests.helpers.models import CLASSES, hooks_of, pixels_of
from tests.helpers.runs import best, quick

IMAGES = toy_images(6)
every_family = pytest.mark.parametrize("name", FAMILIES)
built = cache(small)  # not to be changed
counted = cache(lambda name: count(built(name)))


def state_of(model):
    """What an extraction must not change."""
    flags = [(m.training, getattr(m, "fused_attn", None)) for m in model.modules()]
    asked = [(p.requires_grad, p.grad) for p in model.parameters()]
    return fingerprint(model), flags, asked, hooks_of(model)


def with_every_neuron(dense, *, experts=3):
    """The model with experts that have all hidden neurons, routed at random."""
    model = deepcopy(dense)
    for site in find_mlps(model):
        generator = torch.Generator().manual_seed(site.index)
        centres = torch.randn(experts, site.dim, generator=generator)
        every, shares = [np.arange(site.hidden)] * experts, np.full(experts, 1 / experts)
        layer = MoeMlp(site.module(model), CosineRouter(centres), every, shares)
        replace_module(model, site.name, layer)
    return model


@every_family
def test_experts_with_all_neurons_are_the_dense_model(name):
    dense, x = built(name), pixels_of(built(name), count=2)
    before, seed = fingerprint(dense), torch.random.get_rng_state()
    moe = with_every_neuron(dense)
    assert len(moe_layers(moe)) == len(find_mlps(dense)) > 0
    torch.testing.assert_close(moe(x), dense(x), rtol=1e-3, atol=1e-4)
    assert fingerprint(dense) == before  # runs leave no trace
    assert torch.equal(torch.random.get_rng_state(), seed)


class Products(TorchDispatchMode):
    """Multiply-accumulates of all that runs, from the shapes of what is multiplied."""

    def __init__(self):
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        match func.overloadpacket.__name__:
            case "mm" | "bmm":
                self.macs += out.numel() * args[0].shape[-1]
            case "addmm" | "baddbmm":
                self.macs += out.numel() * args[1].shape[-1]
            case "convolution":
                self.macs += out.numel() * args[1][0].numel()
            case "mkldnn_rnn_layer":  # an LSTM in one direction
                steps, images, _ = args[0].shape
                self.macs += steps * images * sum(weight.numel() for weight in args[1:3])
            case other:
                assert not any(part in other for part in ("attention", "conv", "mv", "rnn", "lstm"))
        return out


@every_family
def test_macs_are_those_of_all_products(name):
    model = deepcopy(built(name)).requires_grad_()
    before = state_of(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), Products() as products:
        model(pixels_of(model, count=1))
    assert count(model).total == products.macs
    assert state_of(model) == before


@every_family
def test_images_together_are_as_each_alone(name):
    model = deepcopy(built(name)).double()
    x = pixels_of(model, count=2).double()
    together = gradients_of(model, x, first=0)
    for image in range(2):
        for site, alone in gradients_of(model, x[image : image + 1], first=image).items():
            torch.testing.assert_close(alone[:, 0], together[site][:, image], rtol=1e-4, atol=1e-6)
    moe, images = with_every_neuron(model).double(), toy_images(2)
    batch, single = (routes(moe, images, batch_size=size) for size in (2, 1))
    for layer, experts in batch.experts.items():
        assert np.array_equal(experts, single.experts[layer])
        assert np.array_equal(batch.counts[layer], single.counts[layer])


def gradients_of(model, x, *, first):
    seeds = [(0, first + image) for image in range(len(x))]
    return output_gradients(model, find_mlps(model), x, seeds=seeds, probes=1)


@pytest.mark.parametrize(("name", "recipe"), [
    *[(name, "best") for name in FAMILIES], *[(name, "paper") for name in list(FAMILIES)[::8]],
])  # fmt: skip
def test_a_model_is_taken_apart_saved_and_measured(name, recipe, tmp_path):
    """Budgets are a third of what the MLPs cost: in some families that is little of the whole."""
    dense = built(name)
    before = state_of(dense)
    mlps = sum(counted(name).by_module[site.name] for site in find_mlps(dense))
    saved = mlps / counted(name).total / 3
    run = extract(dense, IMAGES, quick() if recipe == "paper" else best(macs_reduction=saved))
    assert state_of(dense) == before
    assert any(layer.converted for layer in run.layers)
    x = pixels_of(dense, count=2)
    logits = run.model(x)
    assert logits.shape == (2, len(CLASSES))
    assert torch.isfinite(logits).all()
    run.save(tmp_path / "run")
    assert torch.equal(load(tmp_path / "run").model(x), logits)
    check_measures(run, name)
    check_training(run.model, x)


def check_measures(run, name):
    """Accuracy, MACs and routing of a run are those of what it does."""
    images, dense = toy_images(3), counted(name)
    scores = measure.accuracy({"moe": run.model}, images, reference=built(name)).iloc[0]
    assert 0 <= scores["agreement"] <= 1
    assert scores["kl"] >= -1e-6
    routed = routes(run, images)
    table = measure.macs(run, routes=routed).set_index("component")
    costs = {
        name: moe_layers(run.model)[index].macs_per_token(torch.tensor(routed.shares(index)))
        for index, name in moe_names(run.model).items()
    }
    assert table.loc["total", "macs_dense"] == dense.total
    assert table.loc["total", "macs"] == pytest.approx(moe_macs(run.model, costs))
    for layer in routed.layers:
        tokens = routed.counts[layer].sum(axis=1)
        assert (tokens == dense.tokens[moe_names(run.model)[layer]]).all()
        assert routed.patch_experts(layer).shape[1:] == routed.grid[layer]
        assert math.prod(routed.grid[layer]) + routed.prefix_tokens[layer] == tokens[0]
    assert set(measure.routing(routed, images)["layer"]) == set(routed.layers)


def check_training(model, x):
    """A step down the gradient of some loss changes the experts, and what comes out."""
    model.requires_grad_().train()
    before = model.eval()(x).detach()
    model.train()(x).square().mean().backward()
    weights = [m.fc2.weight for m in moe_layers(model).values() if m.fc2.weight.numel()]
    assert all(torch.isfinite(weight.grad).all() for weight in weights if weight.grad is not None)
    assert any(weight.grad is not None and weight.grad.any() for weight in weights)
    torch.optim.SGD(model.parameters(), lr=1e-2).step()
    assert not torch.equal(model.eval()(x), before)


@pytest.mark.parametrize(
    "name", ["small_vit_average", "small_siglip", "small_pit", "small_crossvit"]
)
def test_plain_attentions_can_be_reduced_too(name):
    dense = built(name)
    run = extract(dense, IMAGES, best(macs_reduction=0.15, attention="low_rank"))
    assert reduced_attentions(run.model).keys() == {s.name for s in plain_attentions(dense)}
    total = measure.macs(run).set_index("component").loc["total"]
    assert 0.149 < 1 - total["macs"] / total["macs_dense"] < 0.2  # in blocks of ranks
    assert torch.isfinite(run.model(pixels_of(dense))).all()
