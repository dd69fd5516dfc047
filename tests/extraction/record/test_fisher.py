import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch.nn import functional

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record import fisher
from moee_analysis.extraction.record.fisher import (
    input_root,
    output_gradients,
    probe,
    products,
    root,
)
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from tests.helpers.layers import sample_of
from tests.helpers.models import SMALL_CONVNEXT, hooks_of, lively, pixels_of, toy_swin, toy_vit

DIM, HIDDEN = 5, 8
SEEDS = [(3, image) for image in range(4)]
HALF = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
METRIC = HALF @ HALF.T


def gradients_of(model, x, *, seeds=SEEDS, probes=2):
    return output_gradients(model, find_mlps(model), x, seeds=seeds, probes=probes)


def changed_logits(model, site, x, delta):
    """Logits of ``x`` with ``delta`` (images, tokens, dim) added to the outputs at ``site``."""
    add = lambda _, output: output + delta.reshape(output.shape)  # noqa: E731
    with watch({0: site.module(model)}, add, "outputs"):
        return model(x)


def windowed():
    model = lively("mobilevit_xxs")
    model.pretrained_cfg["input_size"] = (3, 64, 64)
    return model


# The metric


def test_a_root_squared_is_the_metric_also_of_a_singular_one():
    flat = torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=torch.float64).diag()
    for metric in (METRIC, flat, flat - 1e-12 * torch.eye(4)):
        found = root(metric)
        torch.testing.assert_close(found @ found, metric)
        torch.testing.assert_close(found, found.T)
    torch.testing.assert_close(found, flat.sqrt())


def test_distances_after_the_input_root_are_those_that_hidden_neurons_pass_on():
    torch.manual_seed(0)
    mlp = Mlp(DIM, HIDDEN)
    W1, W2 = mlp.fc1.weight.detach().double(), mlp.fc2.weight.detach().double()
    x = torch.randn(5, DIM, dtype=torch.float64)
    expected = sum((W2[:, j] @ METRIC @ W2[:, j]) * (x @ W1[j]) ** 2 for j in range(HIDDEN))
    torch.testing.assert_close((x @ input_root(mlp, METRIC).T).square().sum(dim=1), expected)


def test_products_are_those_of_all_tokens_that_the_rows_stand_for(monkeypatch):
    rng = np.random.default_rng(0)
    g, weight = rng.normal(size=(3, 40, DIM)).astype("f4"), rng.uniform(1, 4, 40).astype("f4")
    inputs, rows = np.zeros((40, DIM), "f2"), np.arange(5, 40, 2)
    sample = sample_of(inputs=inputs, weight=weight, gradients=g)
    expected = np.einsum("pni,pnj,n->ij", g[:, rows], g[:, rows], weight[rows]) / 3
    for chunk in (4, 1000):
        monkeypatch.setattr(fisher, "CHUNK", chunk)
        np.testing.assert_allclose(products(sample, rows), expected, rtol=1e-5)


# One probe


def test_the_covariance_of_probes_is_that_of_the_softmax():
    logits = torch.tensor([1.0, 0.0, -1.0, 2.5], dtype=torch.float64)
    v = probe(logits.expand(20000, 4), [(0, draw) for draw in range(20000)])
    p = torch.softmax(logits, dim=0)
    torch.testing.assert_close(v.T @ v / len(v), p.diag() - p.outer(p), rtol=0, atol=0.005)
    torch.testing.assert_close(v.mean(dim=0), torch.zeros_like(p), rtol=0, atol=0.01)


def test_a_probe_asks_for_no_common_shift_and_nothing_of_a_prediction_without_doubt():
    v = probe(torch.randn(5, 7, dtype=torch.float64), range(5))
    torch.testing.assert_close(v.sum(dim=1), torch.zeros(5, dtype=torch.float64))
    assert not probe(torch.tensor([[500.0, 0.0, 0.0]]), [0]).any()
    assert not probe(torch.randn(2, 3, requires_grad=True), [0, 1]).requires_grad
    with pytest.raises(ValueError, match="argument"):
        probe(torch.zeros(3, 6), [(0, 0)])


# Gradients at the outputs


@pytest.mark.parametrize("build", [toy_vit, toy_swin])
def test_the_mean_square_is_the_divergence_of_a_small_change(monkeypatch, build):
    model = build().double()
    x = pixels_of(model, count=1).double()
    p = torch.softmax(model(x)[0], dim=0)
    assert p.max() < 0.999
    values, vectors = torch.linalg.eigh(p.diag() - p.outer(p))
    columns = iter((vectors * values.clamp_min(0).sqrt()).T[:, None])
    monkeypatch.setattr(fisher, "probe", lambda *_: next(columns))
    found = gradients_of(model, x, seeds=SEEDS[:1], probes=len(p))
    for site in find_mlps(model):
        g = found[site.name].double()
        delta = 1e-4 * torch.randn(g.shape[1:], dtype=torch.float64)
        changed = changed_logits(model, site, x, delta).log_softmax(dim=1)
        kl = functional.kl_div(changed, p[None], reduction="sum")
        expected = 0.5 * (g * delta).sum(dim=(2, 3)).square().sum()
        torch.testing.assert_close(expected, kl, rtol=5e-3, atol=0)


@pytest.mark.parametrize("build", [toy_vit, toy_swin, lambda: lively(SMALL_CONVNEXT), windowed])
def test_gradients_are_those_of_a_change_added_at_each_site_in_turn(build):
    model = build()
    x = pixels_of(model)
    found = gradients_of(model, x)
    for site in find_mlps(model):
        for number in range(2):
            delta = torch.zeros(found[site.name].shape[1:], requires_grad=True)
            logits = changed_logits(model, site, x, delta)
            v = probe(logits, [(*seed, number) for seed in SEEDS])
            (expected,) = torch.autograd.grad((logits * v).sum(), delta)
            torch.testing.assert_close(found[site.name][number], expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("build", [toy_vit, windowed])
def test_every_image_and_probe_has_a_draw_of_its_own_in_any_batch(build):
    model = build().double()
    x = pixels_of(model).double()
    together, wider = gradients_of(model, x), gradients_of(model, x, probes=3)
    for image in range(4):
        alone = gradients_of(model, x[image : image + 1], seeds=SEEDS[image : image + 1])
        for name, g in alone.items():
            torch.testing.assert_close(g[:, 0], together[name][:, image], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(g[:, 0], wider[name][:2, image], rtol=1e-4, atol=1e-6)
    alike = gradients_of(model, x[:1].expand(4, -1, -1, -1))
    draws = next(iter(alike.values())).flatten(0, 1).flatten(1)
    assert len(torch.unique(draws, dim=0)) == 8


def test_an_output_that_nothing_reads_has_gradients_of_zero():
    model = toy_vit()
    model.aside = toy_vit(depth=1).blocks[0].mlp

    def detour(*_):
        model.aside(torch.zeros(4, 3, 32))

    model.register_forward_pre_hook(detour)
    found = gradients_of(model, pixels_of(model))
    assert found["aside"].shape == (2, 4, 3, 32)
    assert not found["aside"].any()
    assert all(g.any() for name, g in found.items() if name != "aside")


def test_it_works_where_gradients_are_off_and_leaves_the_model_as_it_was():
    model = toy_vit()
    model.blocks[1].train()
    model.blocks[2].mlp.fc1.weight.requires_grad_()
    flags = [(m, m.training) for m in model.modules()]
    asked = [(p, p.requires_grad) for p in model.parameters()]
    with torch.no_grad():
        found = gradients_of(model, pixels_of(model))
        assert not torch.is_grad_enabled()
    assert all(g.any() and not g.requires_grad for g in found.values())
    assert [(m, m.training) for m in model.modules()] == flags
    assert all(p.requires_grad is before and p.grad is None for p, before in asked)
    assert hooks_of(model) == 0


@pytest.mark.parametrize(("calls", "name"), [(0, "spare"), (2, r"blocks\.1\.mlp")])
def test_an_mlp_that_is_not_called_once_is_refused(calls, name):
    model = toy_vit()
    if calls == 2:
        model.blocks[1].ls2.forward = model.blocks[1].mlp.__call__
    else:
        model.spare = toy_vit(depth=1).blocks[0].mlp
    with pytest.raises(MoeeError, match=f"one call of '{name}'.*found {calls} calls"):
        gradients_of(model, pixels_of(model))
    assert hooks_of(model) == 0
