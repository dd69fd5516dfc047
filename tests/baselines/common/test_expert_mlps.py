import pytest
import torch
from timm.layers import Mlp

from moee_analysis.baselines.common.replace_mlps import ExpertMlps


def made(*, bias=True, drop=0.0):
    """MLPs of random weights, and the same as experts."""
    torch.manual_seed(0)
    mlps = [Mlp(6, 10, bias=bias).double() for _ in range(3)]
    return mlps, ExpertMlps(mlps, mlps[0].act, drop=drop)


def inputs(images, count):
    """Tokens of each of the three experts."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, count, 6, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("bias", [True, False])
def test_every_expert_is_its_mlp(bias):
    mlps, experts = made(bias=bias)
    assert (experts.n_experts, experts.hidden) == (3, 10)
    x = inputs(2, 5)
    each = torch.stack([mlp(x[:, e]) for e, mlp in enumerate(mlps)], dim=1)
    torch.testing.assert_close(experts(x), each)


def test_hidden_activations_drop_out_in_training_only():
    x = inputs(1, 50)
    (_, plain), (_, experts) = made(), made(drop=0.5)
    assert ((experts(x) == 0).double().mean() - 0.5).abs() < 0.1
    torch.testing.assert_close(experts.eval()(x), plain(x), rtol=0, atol=0)
