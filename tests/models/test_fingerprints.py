from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.models.fingerprints import alike, answers, fingerprint, hash_weights, identity
from moee_analysis.models.loading import build_model, load_model
from moee_analysis.training.finetune import finetune
from tests.helpers.families import FAMILIES, small
from tests.helpers.images import toy_images
from tests.helpers.models import SMALL_VIT, lively, pixels_of, same_models, toy_swin, toy_vit
from tests.helpers.runs import quick
from tests.training.test_finetune import tuning


def twin(model, **arguments):
    """A model with the same tensors, made by other arguments of timm's."""
    other = build_model(SMALL_VIT, **arguments)
    other.load_state_dict(model.state_dict(), strict=True)
    return other


# What changes it


def with_cfg(model, **facts):
    model.pretrained_cfg = {**model.pretrained_cfg, **facts}
    return model


def activated(model):
    model.blocks[1].mlp.act = nn.ReLU()
    return model


def set_attribute(model):
    model.blocks[0].attn.scale *= 2
    return model


def patched(model):
    whole = model.forward
    model.forward = lambda x: 2 * whole(x)
    return model


def hooked(model):
    model.blocks[3].register_forward_hook(lambda _module, _args, out: out * 1.5)
    return model


def scaled(model, factor):
    model.blocks[1].register_forward_hook(lambda _module, _args, out: out * factor)
    return model


def exchanged(model):
    model.norm = nn.Identity()
    return model


def reordered(model):
    model.blocks = nn.Sequential(*reversed(list(model.blocks)))
    return model


def biased(model):
    model.head.bias[3] += 1e-6
    return model


CHANGES = {
    "act_layer": lambda m: twin(m, act_layer="relu"),
    "num_heads": lambda m: twin(m, num_heads=4),
    "global_pool": lambda m: twin(m, global_pool="avg", fc_norm=False),
    "pooled tokens": lambda m: twin(m, pool_include_prefix=True, global_pool="avg", fc_norm=False),
    "mean": lambda m: with_cfg(m, mean=(0.1, 0.2, 0.3)),
    "crop": lambda m: with_cfg(m, crop_pct=0.5),
    "interpolation": lambda m: with_cfg(m, interpolation="nearest"),
    "label names": lambda m: with_cfg(m, label_names=tuple(map(str, range(1000)))),
    "architecture": lambda m: with_cfg(m, architecture="another"),
    "an activation": activated,
    "an attribute": set_attribute,
    "a forward of its own": patched,
    "a hook": hooked,
    "a norm": exchanged,
    "order": reordered,
    "a weight": biased,
    "a tiny hook": lambda m: scaled(m, 1.00001),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_it_changes_with_all_that_decides_the_outputs(change):
    model = lively()
    changed = CHANGES[change](copy.deepcopy(model))
    assert fingerprint(changed) != fingerprint(model)
    assert fingerprint(model) == fingerprint(lively())


@pytest.mark.parametrize("change", ["a closure", "a buffer that is not saved"])
def test_it_changes_where_no_attribute_tells(change):
    model = toy_swin()
    if change == "a closure":
        factor = [1.0]
        model.register_forward_hook(lambda _module, _args, out: factor[0] * out)
        before = fingerprint(model)
        factor[0] = 1.001
    else:
        before = fingerprint(model)
        buffers = {n: b for n, b in model.named_buffers() if n not in model.state_dict()}
        next(iter(buffers.values())).add_(-1)
    assert fingerprint(model) != before


# What does not


@pytest.mark.parametrize(
    "rates",
    [
        {"drop_rate": 0.3}, {"drop_path_rate": 0.2}, {"attn_drop_rate": 0.1},
        {"proj_drop_rate": 0.1, "pos_drop_rate": 0.1}, {"patch_drop_rate": 0.25},
    ],
)  # fmt: skip
def test_what_drops_at_random_does_not_matter(rates):
    model = lively()
    assert fingerprint(twin(model, **rates)) == fingerprint(model)


@pytest.mark.parametrize("make", [toy_vit, toy_swin, *[partial(small, name) for name in FAMILIES]])
def test_running_a_model_does_not_change_it(make):
    model = make()
    before, seed = fingerprint(model), torch.random.get_rng_state()
    with torch.no_grad():
        model(pixels_of(model, count=2))
    assert fingerprint(model) == before
    assert torch.equal(torch.random.get_rng_state(), seed)


def test_training_flags_gradients_and_fused_kernels_do_not_matter():
    model = lively()
    before = fingerprint(model)
    model.train().requires_grad_(requires_grad=True)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert fingerprint(model) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_threads_do_not_matter():
    model, before = lively(), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fingerprint(model)
        torch.set_num_threads(2)
        assert fingerprint(model) == one
    finally:
        torch.set_num_threads(before)


# Answers


def test_answers_are_alike_for_rounding_and_not_for_changes():
    model = lively()
    rounded = copy.deepcopy(model)
    rounded.head.weight *= 1 + 1e-7
    assert alike(answers(model), answers(rounded))
    rounded.head.weight *= 1 + 1e-2
    assert not alike(answers(model), answers(rounded))
    assert not alike((1.0,), (1.0, 2.0))
    assert alike((0.0, 0.0), (0.0, 0.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_as_its_own_weights_do(dtype):
    model = lively().to(dtype)
    assert answers(model) == answers(copy.deepcopy(model).double())
    assert hash_weights(model) != hash_weights(copy.deepcopy(model).float())


def test_a_model_that_cannot_be_copied_says_so():
    model = lively().requires_grad_(requires_grad=True)
    prune.l1_unstructured(model.head, "weight", 0.1)
    with pytest.raises(MoeeError, match="can be copied"):
        identity(model)
    prune.remove(model.head, "weight")
    assert identity(model)


def test_a_run_of_a_model_with_a_transform_of_its_own_knows_its_dense_model(tmp_path):
    torch.save(lively().state_dict(), tmp_path / "w.pth")
    dense = with_cfg(load_model(SMALL_VIT, weights=tmp_path / "w.pth"), crop_pct=0.5)
    extract(dense, toy_images(24), quick()).save(tmp_path / "run")
    assert load(tmp_path / "run").dense().pretrained_cfg["crop_pct"] == 0.5


def test_a_model_that_cannot_run_on_its_images_is_refused():
    model = with_cfg(lively("test_convnext"), input_size=(3, 1, 1))
    model.stem = nn.Identity()
    with pytest.raises(MoeeError, match="takes images of 3 x 1 x 1"):
        identity(model)


# Where it is used


def test_another_model_of_the_same_weights_gets_a_run_of_its_own(tmp_path):
    model, images = lively(), toy_images(24)
    one = extract(model, images, quick(), store=tmp_path)
    for number, change in enumerate(("act_layer", "num_heads", "mean", "a hook"), start=2):
        other = CHANGES[change](copy.deepcopy(model))
        run = extract(other, images, quick(), store=tmp_path)
        assert len(list(tmp_path.glob("run-*"))) == number
        assert run.dense() is other
        assert not same_models(run.model, one.model) or change == "mean"
    again = extract(lively(), images, quick(), store=tmp_path)
    assert same_models(again.model, one.model)
    assert len(list(tmp_path.glob("run-*"))) == 5


def test_a_run_of_a_hooked_model_is_found_again_with_its_hook(tmp_path):
    model, images = hooked(lively()), toy_images(24)
    runs = [extract(model, images, quick(), store=tmp_path) for _ in range(2)]
    x = pixels_of(model)
    torch.testing.assert_close(runs[0].model(x), runs[1].model(x))
    assert len(list(tmp_path.glob("run-*"))) == 1


def test_tuning_towards_another_dense_model_is_another_tuning(tmp_path):
    images = toy_images(24)
    keys = set()
    for model in (lively(), activated(lively())):
        run = extract(model, images, quick(variance_kept=0.9))
        tuned = finetune(run, toy_images(20), tuning(epochs=1), store=tmp_path)
        keys.add(tuned.run.provenance["finetunings"][0]["key"])
    assert len(keys) == 2


def test_the_dense_model_of_a_run_has_to_be_the_same_in_all_that_counts(tmp_path):
    model, images = lively(act_layer="relu", global_pool="avg"), toy_images(24)
    path = tmp_path / "dense.pth"
    torch.save(model.state_dict(), path)
    dense = load_model(SMALL_VIT, weights=path, act_layer="relu", global_pool="avg")
    extract(dense, images, quick()).save(tmp_path / "run")
    run = load(tmp_path / "run")
    x = pixels_of(model)
    torch.testing.assert_close(run.dense()(x), model(x))
    run.provenance["arguments"].pop("act_layer")
    with pytest.raises(MoeeError, match="other outputs for the same weights"):
        run.dense()
    run.provenance["arguments"]["act_layer"] = "relu"
    run.model.pretrained_cfg["crop_pct"] = 0.5
    with pytest.raises(MoeeError, match="another preparation of the images"):
        run.dense()
    other = with_cfg(copy.deepcopy(dense), mean=(0, 0, 0))
    with pytest.raises(MoeeError, match="another preparation of the images"):
        load(tmp_path / "run", dense=other)


def test_timm_s_own_models_have_a_fingerprint_each():
    names = ("vit_tiny_patch16_224", "deit_tiny_patch16_224")
    models = [timm.create_model(name).eval() for name in names]
    models[1].load_state_dict(models[0].state_dict())
    assert fingerprint(models[0]) != fingerprint(models[1])
    assert hash_weights(models[0]) == hash_weights(models[1])
