from __future__ import annotations

import copy
import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.baselines.controls import statically_pruned
from moee_analysis.data.images import load_images
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract, load
from moee_analysis.models.loading import load_model
from moee_analysis.moe.layer import moe_layers
from moee_analysis.training import trainer as training
from moee_analysis.training.checkpoints import METRICS
from moee_analysis.training.finetune import finetune, history_of
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.utils.storage.store import unfinished_folder
from tests.helpers.families import FAMILIES, small
from tests.helpers.images import contents, toy_images
from tests.helpers.models import divergence, hooks_of, lively, same_models, toy_vit
from tests.helpers.runs import best, quick

SCENES = load_images(split="calibration")
IMAGES = SCENES.take(range(40))
UNSEEN = SCENES.take(range(100, 160))


def tuning(**settings) -> FinetuneConfig:
    defaults = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-4, "augmentation": "none"}
    return FinetuneConfig(**{**defaults, **settings})


@pytest.fixture(scope="module")
def run():
    """The bundled model, taken apart by few images: kinds of tokens, shifts, nearest centres."""
    return extract(load_model(), SCENES.take(range(60, 100)), best(macs_reduction=0.4))


@pytest.fixture(scope="module")
def tuned(run):
    return finetune(run, IMAGES, tuning(epochs=4))


def test_the_model_comes_nearer_to_the_dense_one_also_on_images_it_never_saw(run, tuned):
    before, after = (divergence(run.dense(), m, UNSEEN) for m in (run.model, tuned.run.model))
    assert after < before
    kl = tuned.history["kl"]
    assert tuned.best == kl.idxmin() > 0
    assert tuned.history["loss"].iloc[-1] < tuned.history["loss"].iloc[1] / 2


def test_the_history_begins_before_any_training(run, tuned):
    first = tuned.history.iloc[0]
    held_out, _ = IMAGES.split(0.1, seed=0)
    assert (first["epoch"], first["steps"]) == (0, 0)
    assert math.isnan(first["loss"])
    assert first["kl"] == pytest.approx(divergence(run.dense(), run.model, held_out), rel=1e-4)
    assert tuned.history["steps"].tolist() == [0, 5, 10, 15, 20]  # 36 images, 8 a step
    assert tuned.history["agreement"].between(0, 1).all()


def test_experts_stay_the_subnetworks_they_were(run, tuned):
    before, after = moe_layers(run.model), moe_layers(tuned.run.model)
    assert before.keys() == after.keys()
    for index, layer in before.items():
        for name in ("kept", "neurons", "sizes"):
            assert torch.equal(getattr(layer, name), getattr(after[index], name))
        assert not torch.equal(layer.fc1.weight, after[index].fc1.weight)


def test_a_frozen_router_stays_as_it_was(run, tuned):
    for index, layer in moe_layers(run.model).items():
        own = dict(moe_layers(tuned.run.model)[index].router.named_buffers())
        assert all(torch.equal(own[n], t) for n, t in layer.router.named_buffers())


@pytest.mark.parametrize("router", ["straight_through", "auxiliary"])
def test_a_router_can_learn_too(run, router):
    learned = finetune(run, IMAGES, tuning(router=router, epochs=1)).run
    changed = [
        not torch.equal(other, own)
        for index, layer in moe_layers(run.model).items()
        for own, other in zip(
            layer.router.buffers(),
            moe_layers(learned.model)[index].router.buffers(),
            strict=True,
        )
        if own.is_floating_point() and layer.router.inner.n_experts > 1
    ]
    assert changed
    assert all(changed)
    assert learned.model.state_dict().keys() == run.model.state_dict().keys()
    assert not list(moe_layers(learned.model)[5].router.parameters())


def test_neither_the_run_nor_the_dense_model_is_changed(run):
    models = run.model, run.dense()
    kept = [copy.deepcopy(m.state_dict()) for m in models]
    tuned = finetune(run, IMAGES, tuning(epochs=1, block_weight=0.1, router="auxiliary"))
    for model, before in zip(models, kept, strict=True):
        assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert not any(p.requires_grad or p.grad is not None for p in tuned.run.model.parameters())
    assert hooks_of(tuned.run.model) == hooks_of(run.model)
    assert not tuned.run.model.training


def test_the_shares_are_those_of_the_held_out_images(run, tuned):
    held_out, _ = IMAGES.split(0.1, seed=0)
    (x,) = held_out.batches(run.dense())
    layer = moe_layers(tuned.run.model)[5]
    seen = []
    hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tuned.run.model(x)
    hook.remove()
    used = layer.router(seen[0]).flatten().bincount(minlength=layer.n_experts)
    torch.testing.assert_close(layer.shares, used / used.sum(), rtol=1e-4, atol=1e-6)
    report = tuned.run.layers[5]
    active = float(layer.shares @ layer.sizes.float()) / layer.hidden_dense
    assert report.active_fraction == pytest.approx(active)


def test_parts_of_a_batch_add_up_to_the_batch(run):
    whole, parts = (finetune(run, IMAGES, tuning(epochs=1, accumulate=n)) for n in (1, 3))
    pd.testing.assert_frame_equal(whole.history, parts.history, rtol=1e-4)
    for one, other in zip(whole.run.model.parameters(), parts.run.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # AdamW takes signs of noise


def test_one_step_is_that_of_adamw_on_the_divergence(run):
    """Against the same step, written out."""
    config = tuning(
        epochs=1, batch_size=64, warmup_epochs=0, weight_decay=0.0, learning_rate=1e-4, clip=1e9
    )
    training_images = IMAGES.split(config.held_out, seed=config.seed)[1]
    (x,) = training_images.batches(run.dense())
    student = copy.deepcopy(run.model).requires_grad_(requires_grad=True)
    wanted = log_softmax(run.dense()(x), dim=1)
    loss = kl_div(log_softmax(student(x), dim=1), wanted, reduction="batchmean", log_target=True)
    loss.backward()
    torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0).step()
    found = finetune(run, IMAGES, config)
    assert found.history["loss"].iloc[1] == pytest.approx(loss.item(), rel=1e-4)
    if found.best:
        moved = [
            (a - b).abs().max()
            for a, b in zip(student.parameters(), found.run.model.parameters(), strict=True)
        ]
        assert max(moved) < 5e-5


def test_what_has_ended_is_not_worse_than_what_was_begun_with(run):
    tuned = finetune(run, IMAGES, tuning(learning_rate=1.0, epochs=5, patience=2))
    assert tuned.best == 0
    assert len(tuned.history) == 3
    assert "no lower divergence" in tuned.stopped
    assert same_models(tuned.run.model, run.model)


def test_a_running_mean_of_the_weights_is_what_is_kept(run):
    plain, averaged = (finetune(run, IMAGES, tuning(epochs=2, ema=e)) for e in (None, 0.9))
    starts, *ends = (
        torch.cat([p.flatten() for p in m.parameters()])
        for m in (run.model, averaged.run.model, plain.run.model)
    )
    assert (ends[0] - starts).norm() < (ends[1] - starts).norm()


def test_static_pruning_is_trained_by_the_same_recipe(run):
    pruned = statically_pruned(run, SCENES.take(range(60, 100)))
    tuned = finetune(pruned, IMAGES, tuning(epochs=3))
    assert tuned.history["kl"].min() < tuned.history["kl"].iloc[0]


@pytest.mark.parametrize("config", [quick(macs_reduction=0.2), best(attention="low_rank")])
def test_any_recipe_can_be_trained(config):
    run = extract(lively(), toy_images(), config)
    tuned = finetune(run, toy_images(20), tuning(epochs=1, block_weight=0.5))
    assert tuned.history["loss"].iloc[1] > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_can_be_trained_with_all_losses(name):
    run = extract(small(name), toy_images(12), quick())
    config = tuning(epochs=1, held_out=0.2, block_weight=0.5, router="auxiliary")
    tuned = finetune(run, toy_images(10), config)
    assert tuned.history["loss"].iloc[1] > 0
    assert tuned.history["kl"].notna().all()
    assert not hooks_of(run.dense())


def test_training_in_bfloat16_learns_as_well(run):
    tuned = finetune(run, IMAGES, tuning(epochs=2, precision="bfloat16"))
    assert tuned.history["kl"].min() < tuned.history["kl"].iloc[0]
    assert {p.dtype for p in tuned.run.model.parameters()} == {torch.float32}


def test_too_few_images_are_refused(run):
    with pytest.raises(MoeeError, match="held_out"):
        finetune(run, SCENES.take(range(3)), tuning())


# On disk


def test_a_finished_folder_is_a_run_with_its_history(run, tmp_path):
    tuned = finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    again = load(tmp_path / "tuned")
    assert same_models(again.model, tuned.run.model)
    pd.testing.assert_frame_equal(history_of(again), tuned.history)
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "tuned" / METRICS), tuned.history)
    assert {p.name for p in tmp_path.iterdir()} == {"tuned"}
    assert set(contents(tmp_path / "tuned")) == {"model.safetensors", "run.json", METRICS}


def test_a_fine_tuned_run_can_be_fine_tuned_again(run, tuned):
    again = finetune(tuned.run, IMAGES, tuning(seed=1))
    assert len(again.run.provenance["finetunings"]) == 2
    assert again.history["kl"].iloc[0] == pytest.approx(tuned.history["kl"].min(), rel=1)


def test_what_has_ended_is_not_repeated(run, tmp_path, monkeypatch):
    first = finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    monkeypatch.setattr(training.Training, "run", lambda _: pytest.fail("trained again"))
    second = finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    pd.testing.assert_frame_equal(first.history, second.history)


def test_another_fine_tuning_does_not_take_its_place(run, tmp_path):
    finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    before = contents(tmp_path / "tuned")
    with pytest.raises(MoeeError, match="another folder"):
        finetune(run, IMAGES, tuning(seed=3), out=tmp_path / "tuned")
    assert contents(tmp_path / "tuned") == before
    (tmp_path / "file").write_text("")
    with pytest.raises(MoeeError, match="another folder"):
        finetune(run, IMAGES, tuning(), out=tmp_path / "file")


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize(
    "settings",
    [{}, {"ema": 0.8, "router": "straight_through"}, {"augmentation": "strong", "accumulate": 2}],
)
def test_a_training_that_was_interrupted_comes_to_the_same_bytes(
    run, tmp_path, monkeypatch, settings
):
    config = tuning(epochs=3, **settings)
    finetune(run, IMAGES, config, out=tmp_path / "whole")
    epoch = training.Training._epoch
    for last in (1, 2, 3):
        with monkeypatch.context() as patch:
            patch.setattr(training.Training, "_epoch", _up_to(epoch, last))
            with pytest.raises(Interrupted):
                finetune(run, IMAGES, config, out=tmp_path / "parts")
        assert not (tmp_path / "parts").exists()
        begun = json.loads((unfinished_folder(tmp_path / "parts") / "checkpoint.json").read_text())
        assert len(begun["rows"]) == last
    np.random.default_rng().random()
    torch.rand(3)
    finetune(run, IMAGES, config, out=tmp_path / "parts")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def _up_to(epoch, last):
    def broken(self, number):
        if number == last:
            raise Interrupted
        return epoch(self, number)

    return broken


def test_other_settings_do_not_go_on_with_what_was_begun(run, tmp_path, monkeypatch):
    epoch = training.Training._epoch
    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_epoch", _up_to(epoch, 2))
        with pytest.raises(Interrupted):
            finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    begun = contents(unfinished_folder(tmp_path / "tuned"))
    with pytest.raises(MoeeError, match="was begun"):
        finetune(run, IMAGES, tuning(seed=5), out=tmp_path / "tuned")
    assert contents(unfinished_folder(tmp_path / "tuned")) == begun


# Where the loss is not finite


def _breaking(monkeypatch, epoch):
    """Let the images of one epoch be such that no loss is finite."""
    whole = training.Training._step

    def broken(self, x, losses):
        return whole(self, x * math.nan if self.progress.epochs + 1 == epoch else x, losses)

    monkeypatch.setattr(training.Training, "_step", broken)


def test_a_loss_that_is_not_finite_ends_the_training_and_the_best_epoch_is_kept(
    run, tmp_path, monkeypatch
):
    good = finetune(run, IMAGES, tuning(epochs=3))
    _breaking(monkeypatch, epoch=3)
    tuned = finetune(run, IMAGES, tuning(epochs=3), out=tmp_path / "tuned")
    assert tuned.stopped == "the loss was not finite in epoch 3"
    assert not tuned.finite
    assert tuned.best in (1, 2)
    pd.testing.assert_frame_equal(tuned.history, good.history.iloc[:3])
    assert all(p.isfinite().all() for p in load(tmp_path / "tuned").model.parameters())


def test_a_loss_that_was_never_finite_leaves_nothing(run, tmp_path, monkeypatch):
    _breaking(monkeypatch, epoch=1)
    with pytest.raises(MoeeError, match="lower the learning rate"):
        finetune(run, IMAGES, tuning(), out=tmp_path / "tuned")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "setting",
    [
        {"epochs": 0}, {"learning_rate": 0.0}, {"learning_rate": math.inf}, {"batch_size": 2.5},
        {"router": "thawed"}, {"augmentation": "wild"}, {"ema": 1.0}, {"held_out": 0.0},
        {"precision": "float16"}, {"block_weight": -1.0}, {"accumulate": 0}, {"patience": 0},
    ],
)  # fmt: skip
def test_settings_out_of_their_range_are_refused(setting):
    with pytest.raises(MoeeError, match=next(iter(setting))):
        FinetuneConfig(**setting)


def test_a_model_that_no_name_rebuilds_can_be_trained_and_saved(tmp_path):
    run = extract(toy_vit(), toy_images(), quick())
    tuned = finetune(run, toy_images(20), tuning(epochs=1))
    assert tuned.history["kl"].notna().all()
    kept = finetune(run, toy_images(20), tuning(epochs=1), out=tmp_path / "tuned")
    assert same_models(kept.run.model, tuned.run.model)
    loaded = load(tmp_path / "tuned", dense=run.dense())
    assert same_models(loaded.model, tuned.run.model)
