import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.fingerprints import alike, answers, fingerprint, hash_weights, identity
from moee_analysis.models.loading import build_model, load_model
from tests.helpers.images import toy_images
from tests.helpers.models import SMALL_VIT, TINY, lively, pixels_of, same_models, toy_swin
from tests.helpers.runs import quick


def twin(model, **arguments):
    """A model with the same tensors, made by other arguments of timm's."""
    other = build_model(SMALL_VIT, **TINY, **arguments)
    other.load_state_dict(model.state_dict(), strict=True)
    return other


# What changes it


def with_cfg(model, **facts):
    model.pretrained_cfg = {**model.pretrained_cfg, **facts}
    return model


def scaled(model, factor):
    model.blocks[0].register_forward_hook(lambda _module, _args, out: out * factor)


def patched(model):
    whole = model.forward
    model.forward = lambda x: 2 * whole(x)


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
    "an activation": lambda m: setattr(m.blocks[1].mlp, "act", nn.ReLU()),
    "an attribute": lambda m: setattr(m.blocks[0].attn, "scale", 2.0),
    "a forward of its own": patched,
    "a hook": lambda m: scaled(m, 1.5),
    "a tiny hook": lambda m: scaled(m, 1.00001),
    "a norm": lambda m: setattr(m, "norm", nn.Identity()),
    "order": lambda m: setattr(m, "blocks", nn.Sequential(*reversed(list(m.blocks)))),
    "a weight": lambda m: m.head.bias[3].add_(1e-6),
}  # fmt: skip


def changed(change):
    model = lively(**TINY)
    other = CHANGES[change](model)
    return other if isinstance(other, nn.Module) else model


@pytest.mark.parametrize("change", CHANGES)
def test_it_changes_with_all_that_decides_the_outputs(change):
    assert fingerprint(changed(change)) != fingerprint(lively(**TINY))


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


@pytest.mark.parametrize("rates", [
    {"drop_rate": 0.3}, {"drop_path_rate": 0.2}, {"attn_drop_rate": 0.1},
    {"proj_drop_rate": 0.1, "pos_drop_rate": 0.1}, {"patch_drop_rate": 0.25},
])  # fmt: skip
def test_what_drops_at_random_does_not_matter(rates):
    model = lively(**TINY)
    assert fingerprint(twin(model, **rates)) == fingerprint(model)


def test_runs_training_flags_gradients_fused_kernels_and_threads_do_not_matter():
    model, threads = lively(**TINY), torch.get_num_threads()
    before = fingerprint(model)
    assert before == fingerprint(lively(**TINY))
    model(pixels_of(model, count=2))
    assert fingerprint(model) == before
    for number in (1, 2):
        torch.set_num_threads(number)
        assert fingerprint(model) == before
    torch.set_num_threads(threads)
    model.train().requires_grad_(requires_grad=True)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert fingerprint(model) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())


# Answers


def test_answers_are_alike_for_rounding_and_not_for_changes():
    model = lively(**TINY)
    rounded = copy.deepcopy(model)
    rounded.head.weight *= 1 + 1e-7
    assert alike(answers(model), answers(rounded))
    rounded.head.weight *= 1 + 1e-2
    assert not alike(answers(model), answers(rounded))
    assert not alike((1.0,), (1.0, 2.0))
    assert alike((0.0, 0.0), (0.0, 0.0))


def test_answering_leaves_no_trace_in_a_model_that_keeps_tensors_and_shares_modules():
    model = lively(**TINY)
    model.blocks[1].attn, model.cache = model.blocks[0].attn, {}
    expected = answers(copy.deepcopy(model))
    model.norm.register_forward_hook(lambda _, args, out: model.cache.update(seen=out))
    model.norm.register_forward_hook(lambda norm, args, out: setattr(norm, "last", out))
    assert answers(model) == expected
    assert (model.cache, hasattr(model.norm, "last")) == ({}, False)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(pixels_of(model)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_answers_as_its_own_weights_do(dtype):
    model = lively(**TINY).to(dtype)
    assert answers(model) == answers(copy.deepcopy(model).double())
    assert hash_weights(model) != hash_weights(copy.deepcopy(model).float())


def test_a_model_that_cannot_be_copied_says_so():
    model = lively(**TINY).requires_grad_(requires_grad=True)
    prune.l1_unstructured(model.head, "weight", 0.1)
    with pytest.raises(MoeeError, match="can be copied"):
        identity(model)
    prune.remove(model.head, "weight")
    assert identity(model)


def test_a_model_that_cannot_run_on_its_images_is_refused():
    model = with_cfg(lively("test_convnext"), input_size=(3, 1, 1))
    model.stem = nn.Identity()
    with pytest.raises(MoeeError, match="takes images of 3 x 1 x 1"):
        identity(model)


# Where it is used


def test_another_model_of_the_same_weights_gets_a_run_of_its_own(tmp_path):
    images, config = toy_images(2), quick(layers=(0,), experts="one")
    one = extract(lively(**TINY), images, config, store=tmp_path)
    for number, change in enumerate(("act_layer", "mean", "a hook"), start=2):
        other = changed(change)
        run = extract(other, images, config, store=tmp_path)
        assert len(list(tmp_path.glob("run-*"))) == number
        assert run.dense() is other
        again = extract(changed(change), images, config, store=tmp_path)
        x = pixels_of(other, count=1)
        torch.testing.assert_close(again.model(x), run.model(x))
    assert same_models(extract(lively(**TINY), images, config, store=tmp_path).model, one.model)
    assert len(list(tmp_path.glob("run-*"))) == 4


def test_the_dense_model_of_a_run_has_to_be_the_same_in_all_that_counts(tmp_path):
    given = {"act_layer": "relu", "global_pool": "avg", **TINY}
    torch.save(lively(**given).state_dict(), tmp_path / "dense.pth")
    dense = with_cfg(load_model(SMALL_VIT, weights=tmp_path / "dense.pth", **given), crop_pct=0.7)
    extract(dense, toy_images(2), quick(experts="one")).save(tmp_path / "run")
    run, x = load(tmp_path / "run"), pixels_of(dense)
    torch.testing.assert_close(run.dense()(x), dense(x))
    assert run.dense().pretrained_cfg["crop_pct"] == 0.7
    run.provenance["arguments"].pop("act_layer")
    with pytest.raises(MoeeError, match="other outputs for the same weights"):
        run.dense()
    run.provenance["arguments"]["act_layer"] = "relu"
    run.model.pretrained_cfg["crop_pct"] = 0.5
    with pytest.raises(MoeeError, match="another preparation of the images"):
        run.dense()
    with pytest.raises(MoeeError, match="another preparation of the images"):
        load(tmp_path / "run", dense=with_cfg(copy.deepcopy(dense), mean=(0, 0, 0)))
