from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import unread_patches
from moee_analysis.extraction.record.recording import Recording
from moee_analysis.extraction.record.tokens import (
    RecordedLayer,
    TokenPlan,
    capture_mlps,
    leading_kinds,
    prefix_kinds,
    token_plan,
)
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import find_mlps
from tests.helpers.images import toy_images
from tests.helpers.layers import PLANTED
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
    "deit_tiny_distilled_patch16_224": {
        f"blocks.0.{part}": ("cls", "dist") for part in ("mlp", "attn")
    },
}


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
    model.num_prefix_tokens = 7
    with pytest.raises(MoeeError, match=f"7 leading tokens.*found {', '.join(kinds) or 'none'} am"):
        prefix_kinds(model)


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


@pytest.mark.parametrize("name", SEEN)
def test_every_layer_sees_the_leading_tokens_that_reach_it(name):
    with torch.device("meta"):  # shapes are all there is to see
        model = timm.create_model(name).eval()
    assert leading_kinds(model, SEEN[name]) == SEEN[name]
    assert hooks_of(model) == 0
    if name == "cait_xxs24_224":  # patches alone are sampled without a prefix
        plan = token_plan(model, [site.name for site in find_mlps(model)], 7, seed=3)
        assert plan.weights(196).tolist() == [28] * 7
        assert plan.weights(1).tolist() == [1]


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


# One forward pass


def test_inputs_and_hidden_activations_are_what_a_hand_computes():
    model, images = toy_vit(), pixels_of(toy_vit())
    with capture_mlps(model, find_mlps(model)) as captured:
        model(images)
    x = model._pos_embed(model.patch_embed(images))
    for block, seen in zip(model.blocks, captured.values(), strict=True):
        x = x + block.attn(block.norm1(x))
        inputs = block.norm2(x)
        hidden = torch.nn.functional.gelu(inputs @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        torch.testing.assert_close(seen["inputs"], inputs)
        torch.testing.assert_close(seen["hidden"], hidden)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_a_grid_of_tokens_is_flattened_row_by_row():
    model, grids = toy_swin(), {}
    site = find_mlps(model)[1]
    site.module(model).register_forward_pre_hook(lambda _, args: grids.update(seen=args[0]))
    with capture_mlps(model, [site]) as captured:
        model(pixels_of(model))
    assert captured[site.name]["inputs"].shape == (4, 16, 32)
    torch.testing.assert_close(captured[site.name]["inputs"].flatten(), grids["seen"].flatten())


# Which tokens


def test_prefix_tokens_are_kept_and_patches_drawn_without_repetition_by_the_seed():
    plan, again, other = (TokenPlan(per_image=5, prefix=2, seed=seed) for seed in (3, 3, 4))
    rows = [plan.positions(image, 17).tolist() for image in range(20)]
    for positions in rows:
        assert positions[:2] == [0, 1]
        assert positions == sorted(set(positions) & set(range(17)))
        assert len(positions) == 7
    assert again.positions(7, 17).tolist() == rows[7] != rows[8]
    assert other.positions(7, 17).tolist() != rows[7]


@pytest.mark.parametrize("tokens", [1, 2, 5, 17, 65])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_weights_stand_for_all_tokens_of_the_image(tokens, prefix):
    plan, everything = (TokenPlan(per_image=count, prefix=prefix) for count in (6, None))
    assert plan.weights(tokens).sum() == pytest.approx(tokens)
    assert len(plan.weights(tokens)) == len(plan.positions(0, tokens))
    assert everything.positions(3, tokens).tolist() == list(range(tokens))
    assert everything.weights(tokens).tolist() == [1] * tokens


def test_layers_of_patches_alone_have_no_prefix_and_a_plan_of_their_own():
    plan = TokenPlan(per_image=5, prefix=1, patches_alone=frozenset({16}))
    assert plan.weights(16).tolist() == [16 / 5] * 5
    assert plan.weights(17).tolist() == [1] + [16 / 5] * 5
    assert plan.facts != TokenPlan(per_image=5, prefix=1).facts


# A layer with hidden activations in any case


def test_hidden_activations_that_were_not_recorded_are_computed_from_the_inputs():
    model, images, plan = toy_vit(), toy_images(5), TokenPlan(None, 1)
    sites = tuple(find_mlps(model))
    written, bare = (
        Recording(model, images, sites, plan, kinds).in_memory()
        for kinds in (("inputs", "hidden"), ("inputs",))
    )
    for site in sites:
        mlp = site.module(model)
        known, computed = (RecordedLayer(site, mlp, of[site.name]) for of in (written, bare))
        assert isinstance(known.sample.hidden, np.ndarray)
        assert computed.sample.hidden is None
        for rows in (slice(3, 9), np.array([0, 20, 84])):
            found = computed.hidden(rows)
            assert found.dtype == torch.float32
            x = torch.from_numpy(np.array(computed.sample.inputs[rows])).float()
            torch.testing.assert_close(found, mlp.act(mlp.fc1(x)))
            torch.testing.assert_close(known.hidden(rows), found, rtol=0.01, atol=0.02)
        part = replace(computed, sample=computed.sample.part(slice(7, 20)))
        own, whole = part.hidden(np.array([0, 5])), computed.hidden(np.array([7, 12]))
        torch.testing.assert_close(own, whole)


@pytest.mark.parametrize("size", [1, 7, 89, 90, 1000])
def test_chunks_are_all_rows_one_after_the_other(size):
    chunks = list(PLANTED.chunks(size=size))
    assert np.concatenate(chunks).tolist() == list(range(90))
    assert max(map(len, chunks)) <= size
    assert [rows.tolist() for rows in PLANTED.chunks(np.array([5, 8, 9]), size=2)] == [[5, 8], [9]]
