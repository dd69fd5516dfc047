from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from moee_analysis.utils import matmul as products
from moee_analysis.utils.matmul import Product, fastest_kernel

needs_onednn = pytest.mark.skipif(not products._onednn_runs(), reason="this torch has no oneDNN")
KINDS = [
    ("blas", False),
    *(pytest.param("onednn", packed, marks=needs_onednn) for packed in (False, True)),
]
TOKENS = torch.ones(4, 8)


def drawn(tokens, dim, width):
    torch.manual_seed(0)
    return torch.randn(tokens, dim), torch.randn(width, dim), torch.randn(width)


@pytest.mark.parametrize(("kernel", "packed"), KINDS)
@pytest.mark.parametrize("shape", [(0, 8, 5), (1, 8, 5), (7, 8, 0), (7, 0, 5), (100, 48, 33)])
def test_products_are_those_of_double_precision(kernel, packed, shape):
    x, weight, bias = drawn(*shape)
    exact = x.double() @ weight.double().T
    with torch.no_grad():
        product = Product.of(weight, kernel, packed=packed)
        torch.testing.assert_close(product(x), exact.float())
        torch.testing.assert_close(product(x, bias), (exact + bias).float())
        torch.testing.assert_close(product.onto(exact.float(), x), (2 * exact).float())


@pytest.mark.parametrize(("kernel", "packed"), KINDS)
@pytest.mark.parametrize(
    "act", [nn.GELU(), nn.GELU(approximate="tanh"), nn.ReLU(), nn.SiLU(), nn.Tanh()], ids=str
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_activations_are_those_of_a_pass_of_their_own(kernel, packed, act, has_bias):
    x, weight, bias = drawn(50, 16, 24)
    bias = bias if has_bias else None
    with torch.no_grad():
        found = Product.of(weight, kernel, packed=packed).activated(x, bias, act)
        torch.testing.assert_close(found, act(nn.functional.linear(x, weight, bias)))


@needs_onednn
def test_weights_of_another_order_in_memory_are_the_same_weights():
    x, weight, _ = drawn(9, 16, 24)
    turned = weight.T.contiguous().T
    with torch.no_grad():
        for packed in (False, True):
            found = Product.of(turned, "onednn", packed=packed)(x)
            torch.testing.assert_close(found, Product(weight)(x))


@pytest.fixture
def fast(monkeypatch):
    """A machine on which oneDNN is fast."""
    monkeypatch.setattr(products, "onednn_speed", lambda threads: 2.0)
    with torch.no_grad():
        yield


@needs_onednn
def test_the_faster_kernel_is_used_for_plain_inference(fast, monkeypatch):
    assert fastest_kernel(TOKENS) == "onednn"
    monkeypatch.setattr(products, "onednn_speed", lambda threads: 1.05)
    assert fastest_kernel(TOKENS) == "blas"


@pytest.mark.usefixtures("fast")
def test_blas_is_used_for_all_else(monkeypatch):
    for other in (TOKENS.double(), TOKENS.bfloat16(), TOKENS.to("meta")):
        assert fastest_kernel(other) == "blas"
    with torch.enable_grad():
        assert fastest_kernel(TOKENS) == "blas"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert fastest_kernel(TOKENS) == "blas"
    with FlopCounterMode(display=False):
        assert fastest_kernel(TOKENS) == "blas"
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert fastest_kernel(TOKENS) == "blas"


@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_a_torch_whose_onednn_does_not_run_does_without(error, monkeypatch):
    def fails(*_args, **_settings):
        raise error("not here")

    monkeypatch.setattr(Product, "of", fails)
    monkeypatch.setattr(products, "_onednn_runs", products._onednn_runs.__wrapped__)
    with torch.no_grad():
        assert fastest_kernel(TOKENS) == "blas"


@needs_onednn
def test_the_speed_is_measured_once_and_draws_no_random_numbers():
    before = torch.random.get_rng_state()
    speed = products.onednn_speed(torch.get_num_threads())
    assert 0 < speed < float("inf")
    assert products.onednn_speed(torch.get_num_threads()) == speed
    assert torch.equal(torch.random.get_rng_state(), before)
