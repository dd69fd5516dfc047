import pytest
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.baselines.common.exchange import (
    ExpertMlps,
    fill_budget,
    find_tokens,
    replace_mlps,
    sites_at,
)
from moee_analysis.models.loading import find_mlps
from tests.helpers.families import small
from tests.helpers.models import hooks_of, pixels_of, toy_swin, toy_vit


def test_layers_are_chosen_in_order():
    sites = find_mlps(toy_vit())
    assert sites_at(sites, (2, 0, 2)) == [sites[0], sites[2]]


def test_layers_grow_in_turn_by_their_share_of_tokens_up_to_all_of_them():
    alike = [10, 10, 10], [20, 20, 20]
    assert fill_budget(0.5, *alike, dense=1000, fixed=150) == [12, 12, 11]
    many, few = fill_budget(0.5, [3, 12], [64, 16], dense=1000, fixed=200)
    assert many / 64 == pytest.approx(few / 16, abs=1 / 16)
    assert fill_budget(0.01, *alike, dense=10_000, fixed=0) == [20, 20, 20]


@pytest.mark.parametrize(("model", "expected"), [
    (toy_vit(), [(1, 17)] * 3),
    (toy_swin(), [(1, 64), (1, 16)]),
    (small("small_convnext"), [(1, 256), (1, 64), (1, 16), (1, 16), (1, 4)]),
    (small("small_mobilevit"), [(4, 16), (4, 4), (4, 4)]),  # one for each pixel of a 2 x 2 patch
])  # fmt: skip
def test_places_have_the_tokens_that_are_routed_together(model, expected):
    assert find_tokens(model, find_mlps(model)) == expected
    assert hooks_of(model) == 0


def test_what_is_exchanged_has_device_precision_and_trainability_of_the_mlp():
    dense = toy_vit().double()
    dense.blocks[1].requires_grad_()
    sites = find_mlps(dense)
    sizes = [(site, 32) for site in sites[:2]]
    model = replace_mlps(dense.train(), sizes, lambda _site, size, _mlp: nn.Linear(size, size))
    first, second, third = (block.mlp for block in model.blocks)
    assert not model.training
    assert first.weight.dtype == torch.float64
    assert [first.weight.requires_grad, second.weight.requires_grad] == [False, True]
    assert type(third) is type(dense.blocks[0].mlp)
    assert model(pixels_of(dense).double()).shape == (4, 6)


@pytest.mark.parametrize("bias", [True, False])
def test_every_expert_is_its_mlp_whose_activations_drop_out_in_training_only(bias):
    mlps = [Mlp(6, 10, bias=bias).double() for _ in range(3)]
    experts, x = ExpertMlps(mlps, mlps[0].act, drop=0.5), torch.randn(2, 3, 50, 6).double()
    assert (experts.n_experts, experts.hidden) == (3, 10)
    assert ((experts(x) == 0).double().mean() - 0.5).abs() < 0.1
    each = torch.stack([mlp(x[:, e]) for e, mlp in enumerate(mlps)], dim=1)
    torch.testing.assert_close(experts.eval()(x), each)
