import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.extraction.record.tokens import leading_kinds, prefix_kinds, token_plan
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from tests.helpers.models import SMALL_CONVNEXT, hooks_of, lively, pixels_of, toy_swin, toy_vit


def small(architecture=VisionTransformer, **settings):
    torch.manual_seed(0)
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "num_classes": 6}
    model = architecture(**sizes, depth=2, **settings)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model.eval().requires_grad_(requires_grad=False)


def flexible():
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}
    return NaFlexVit(NaFlexVitCfg(**sizes, class_token=True, reg_tokens=2), num_classes=6)


REGISTERS = ("register", "register")
MODELS = {  # kinds of the leading tokens, and the MLPs whose outputs at patches nothing reads
    "vit": (toy_vit, ("cls",), {"blocks.2.mlp"}),
    "distilled": (lambda: small(VisionTransformerDistilled), ("cls", "dist"), {"blocks.1.mlp"}),
    "registers": (lambda: small(reg_tokens=2), ("cls", *REGISTERS), {"blocks.1.mlp"}),
    "averaged": (lambda: small(global_pool="avg"), ("cls",), set()),
    "without cls": (
        lambda: small(class_token=False, reg_tokens=2, global_pool="avg"), REGISTERS, set(),
    ),
    "swin": (toy_swin, (), set()),
    "convnext": (lambda: lively(SMALL_CONVNEXT), (), set()),
}  # fmt: skip


# What the leading tokens are


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        *[(build, kinds) for build, kinds, _ in MODELS.values()],
        (lambda: small(Eva, num_reg_tokens=2), ("cls", *REGISTERS)),
        (flexible, ("cls", *REGISTERS)),
    ],
)
def test_every_leading_token_has_its_kind(build, kinds):
    model = build()
    assert prefix_kinds(model) == kinds
    assert len(kinds) == getattr(model, "num_prefix_tokens", 0)


@pytest.mark.parametrize("name", ["vit", "distilled", "registers"])
def test_the_order_is_that_in_which_the_tokens_enter_the_first_block(name):
    model = MODELS[name][0]()
    marks = {"cls_token": ("cls", 1000.0), "dist_token": ("dist", 2000.0)}
    marks["reg_token"] = ("register", 3000.0)
    for key, parameter in model.named_parameters():
        if key in marks:
            parameter.fill_(marks[key][1])
    entering = model._pos_embed(model.patch_embed(pixels_of(model)))[0, :, 0]
    seen = [kind for value in entering for kind, mark in marks.values() if abs(value - mark) < 100]
    assert tuple(seen) == prefix_kinds(model)


SEEN = {
    "cait_xxs24_224": {"blocks.0.mlp": (), "blocks_token_only.1.mlp": ("cls",)},
    "xcit_nano_12_p16_224": {"blocks.0.mlp": (), "cls_attn_blocks.1.mlp": ("cls",)},
    "convit_tiny": {"blocks.9.mlp": (), "blocks.10.mlp": ("cls",)},
    "volo_d1_224": {"network.0.0.mlp": (), "network.2.0.mlp": (), "post_network.1.mlp": ("cls",)},
    "pit_ti_distilled_224": {f"transformers.{n}.blocks.0.mlp": ("cls", "dist") for n in range(3)},
    "tnt_s_legacy_patch16_224": {"blocks.0.mlp_in": (), "blocks.0.mlp": ("cls",)},
    "crossvit_tiny_240": {f"blocks.0.blocks.{branch}.0.mlp": ("cls",) for branch in (0, 1)},
    "vit_small_patch16_dinov3": {"blocks.0.mlp": ("cls", *2 * REGISTERS)},
    "vit_base_patch16_siglip_224": {"blocks.0.mlp": (), "attn_pool.mlp": ()},
    "deit_tiny_distilled_patch16_224": dict.fromkeys(
        ("blocks.0.mlp", "blocks.0.attn"), ("cls", "dist")
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_every_layer_sees_the_leading_tokens_that_reach_it(name):
    with torch.device("meta"):  # shapes are all there is to see
        model = timm.create_model(name).eval()
    assert leading_kinds(model, SEEN[name]) == SEEN[name]
    assert hooks_of(model) == 0
    if name == "cait_xxs24_224":  # patches alone are sampled without a prefix
        names = [site.name for site in find_mlps(model)]
        plan = token_plan(model, names, 7, seed=3)
        assert plan.weights(196).tolist() == [28] * 7
        assert plan.weights(1).tolist() == [1]


def test_leading_tokens_of_an_unknown_kind_are_refused():
    model = toy_vit()
    model.num_prefix_tokens = 3
    with pytest.raises(MoeeError, match=r"3 leading tokens.*found cls among"):
        prefix_kinds(model)


# Whose outputs nothing reads


def zeroed_at_patches(model, name, x):
    """Logits with the outputs at all patches of one MLP set to zero."""

    def zero(_, output):
        tokens = output.reshape(len(x), -1, output.shape[-1]).clone()
        tokens[:, len(prefix_kinds(model)) :] = 0
        return tokens.reshape(output.shape)

    with watch({0: model.get_submodule(name)}, zero, "outputs"):
        return model(x)


@pytest.mark.parametrize("name", MODELS)
def test_unread_are_exactly_those_whose_outputs_at_patches_change_no_logit(name):
    build, _, unread = MODELS[name]
    model = build().train()
    with torch.no_grad():
        assert unread_patches(model) == unread
    assert all(module.training for module in model.modules())  # it is left as it was
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert hooks_of(model) == 0
    x = pixels_of(model.eval())
    logits = model(x)
    silent = {s.name for s in find_mlps(model) if zeroed_at_patches(model, s.name, x).equal(logits)}
    assert silent == unread
