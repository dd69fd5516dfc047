import pytest
import timm
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.models.loading import find_mlps
from moee_analysis.models.survey import survey
from moee_analysis.moe.layer import all_mlps
from tests.helpers.models import toy_moe, toy_swin, toy_vit


def built(name):
    with torch.device("meta"):
        return timm.create_model(name, pretrained=False)


def reasons(model):
    return {mlp.name: mlp.reason for mlp in survey(model)}


def test_everything_that_can_be_taken_apart_is_found():
    model = toy_swin()
    assert [mlp.name for mlp in survey(model)] == [site.name for site in find_mlps(model)]
    assert all(mlp.convertible and mlp.kind == "Mlp (Linear, Identity)" for mlp in survey(model))


@pytest.mark.parametrize(("name", "kind", "reason"), [
    ("eva02_tiny_patch14_224", "GluMlp", "gated"),
    ("vit_small_plus_patch16_dinov3", "SwiGLU", "gated"),
    ("convnextv2_atto", "GlobalResponseNormMlp", "GRN"),
    ("poolformer_s12", "Mlp (Conv2d, Identity)", "convolutional"),
    ("focalnet_tiny_srf", "Mlp (Conv2d, Identity)", "convolutional"),
    ("convnext_atto", "Mlp (Conv2d, Identity)", "convolutional"),
    ("mobilevitv2_050", "ConvMlp", "convolutional"),
    ("pvt_v2_b0", "MlpWithDepthwiseConv", "convolutional"),
    ("tiny_vit_5m_224", "NormMlp", "a norm inside"),
    ("levit_128s", "LevitMlp", "not a timm.layers.Mlp"),
])  # fmt: skip
def test_what_cannot_be_taken_apart_has_its_reason(name, kind, reason):
    found = [mlp for mlp in survey(built(name)) if mlp.kind == kind]
    assert found
    assert all(mlp.reason.startswith(reason) for mlp in found)
    assert not any(mlp.convertible for mlp in survey(built(name)))


@pytest.mark.parametrize(("name", "part", "reason"), [
    ("mixer_s16_224", "mlp_tokens", "mixes tokens"),
    ("vit_relpos_small_patch16_224", "rel_pos.mlp", "sees coordinates"),
    ("maxvit_rmlp_pico_rw_256", "rel_pos.mlp", "sees coordinates"),
    ("swinv2_cr_tiny_224", "meta_mlp", "sees coordinates"),
    ("coat_tiny", "mlp2", "stands in 3 places"), ("csatv2", "attn.mlp", "sees one number"),
    ("davit_tiny", "head", "the classifier's head"),
])  # fmt: skip
def test_mlps_without_tokens_of_their_own_are_left_out(name, part, reason):
    model = built(name)
    left_out = {name: why for name, why in reasons(model).items() if why}
    those = {name: why for name, why in left_out.items() if name.endswith(part)}
    assert those
    assert all(why.startswith(reason) for why in those.values())
    assert left_out.keys() - those.keys() <= {"head"}
    assert {site.name for site in find_mlps(model)} == reasons(model).keys() - left_out.keys()
    assert list(all_mlps(model)) == [site.name for site in find_mlps(model)]


def test_an_mlp_with_a_norm_between_its_layers_is_not_taken_apart():
    model = nn.ModuleDict({"plain": Mlp(4, 8), "normed": Mlp(4, 8, norm_layer=nn.LayerNorm)})
    assert reasons(model) == {"plain": "", "normed": "a norm inside, beside its Linear layers"}


def test_mlps_with_the_same_weights_are_left_out_under_one_name():
    shared = Mlp(4, 8)
    model = nn.ModuleDict({"one": shared, "own": Mlp(4, 8), "other": shared})
    assert reasons(model) == {"one": "stands in 2 places with the same weights", "own": ""}


def test_a_model_is_its_layers_whether_they_are_routed_or_not():
    dense, routed = toy_vit(), toy_moe(toy_vit(), layers=[1])
    assert list(all_mlps(dense)) == list(all_mlps(routed))
