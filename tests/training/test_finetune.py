import copy
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import kl_div, log_softmax

from moee_analysis.baselines.controls import statically_pruned
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.capture import capture
from moee_analysis.moe.layer import moe_layers
from moee_analysis.training import trainer as training
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune, history_of
from moee_analysis.training.trainer import METRICS, read_checkpoint
from moee_analysis.utils.storage.store import unfinished_folder
from tests.helpers.families import FAMILIES, small
from tests.helpers.images import contents, toy_images
from tests.helpers.models import divergence, hooks_of, same_models, toy_vit
from tests.helpers.runs import best, quick

CALIBRATION, IMAGES, FEW, UNSEEN = (
    toy_images(150).take(range(*ends)) for ends in ((0, 22), (22, 90), (22, 40), (90, 150))
)


def tuning(**settings):
    defaults = {"epochs": 2, "batch_size": 8, "learning_rate": 1e-4, "augmentation": "none"}
    return FinetuneConfig(**{**defaults, **settings})


@pytest.fixture(scope="module")
def run():
    """A model that no name rebuilds, taken apart: kinds of tokens, shifts, nearest centres."""
    return extract(toy_vit(), CALIBRATION, best(macs_reduction=0.35))


@pytest.fixture(scope="module")
def tuned(run):
    return finetune(run, IMAGES, tuning(epochs=4))


@pytest.fixture(scope="module")
def saved(run, tmp_path_factory):
    """It fine-tuned, and the folder where it lies."""
    folder = tmp_path_factory.mktemp("saved") / "tuned"
    return finetune(run, FEW, tuning(), out=folder), folder


def test_the_model_comes_nearer_to_the_dense_one_also_on_images_it_never_saw(run, tuned):
    before, after = (divergence(run.dense(), m, UNSEEN) for m in (run.model, tuned.run.model))
    assert after < before
    history, (held_out, _) = tuned.history, IMAGES.split(0.1, seed=0)
    assert tuned.best == history["kl"].idxmin() > 0
    assert history["loss"].iloc[-1] < history["loss"].iloc[1] / 2
    first = history.iloc[0]  # before any training
    assert (first["epoch"], first["steps"]) == (0, 0)
    assert math.isnan(first["loss"])
    assert first["kl"] == pytest.approx(divergence(run.dense(), run.model, held_out), rel=1e-4)
    assert history["steps"].tolist() == [0, 8, 16, 24, 32]  # 61 images, 8 a step
    assert history["agreement"].between(0, 1).all()


def test_experts_stay_the_subnetworks_they_were_and_so_do_frozen_routers(run, tuned):
    before, after = moe_layers(run.model), moe_layers(tuned.run.model)
    assert before.keys() == after.keys()
    for index, layer in before.items():
        for name in ("kept", "neurons", "sizes"):
            assert torch.equal(getattr(layer, name), getattr(after[index], name))
        assert not torch.equal(layer.fc1.weight, after[index].fc1.weight)
        own = dict(after[index].router.named_buffers())
        assert all(torch.equal(own[n], t) for n, t in layer.router.named_buffers())


@pytest.mark.parametrize("router", ["straight_through", "auxiliary"])
def test_a_router_can_learn_too_and_neither_the_run_nor_the_dense_model_is_changed(run, router):
    models = run.model, run.dense()
    states = [copy.deepcopy(m.state_dict()) for m in models]
    learned = finetune(run, FEW, tuning(router=router, epochs=1, block_weight=0.1)).run.model
    after = moe_layers(learned)
    changed = [
        not torch.equal(other, own)
        for index, layer in moe_layers(run.model).items()
        for own, other in zip(layer.router.buffers(), after[index].router.buffers(), strict=True)
        if own.is_floating_point() and layer.router.inner.n_experts > 1
    ]
    assert changed
    assert all(changed)
    assert learned.state_dict().keys() == run.model.state_dict().keys()
    assert not [p for layer in after.values() for p in layer.router.parameters()]
    for model, before in zip(models, states, strict=True):
        assert all(torch.equal(before[k], t) for k, t in model.state_dict().items())
    for model in (*models, learned):
        assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert hooks_of(learned) == hooks_of(run.model)
    assert not learned.training


def test_the_shares_are_those_of_the_held_out_images(run, tuned):
    held_out, _ = IMAGES.split(0.1, seed=0)
    (x,) = held_out.batches(run.dense())
    layer = moe_layers(tuned.run.model)[1]
    with capture(tuned.run.model, ["blocks.1.mlp"]) as seen:
        tuned.run.model(x)
    used = layer.router(seen["blocks.1.mlp"]).flatten().bincount(minlength=layer.n_experts)
    torch.testing.assert_close(layer.shares, used / used.sum(), rtol=1e-4, atol=1e-6)
    active = float(layer.shares @ layer.sizes.float()) / layer.hidden_dense
    assert tuned.run.layers[1].active_fraction == pytest.approx(active)


def test_parts_of_a_batch_add_up_to_the_batch(run):
    whole, parts = (finetune(run, FEW, tuning(epochs=1, accumulate=n)) for n in (1, 3))
    pd.testing.assert_frame_equal(whole.history, parts.history, rtol=1e-4)
    for one, other in zip(whole.run.model.parameters(), parts.run.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # AdamW takes signs of noise


def test_one_step_is_that_of_adamw_on_the_divergence(run):
    """Against the same step, written out."""
    config = tuning(
        epochs=1, batch_size=64, warmup_epochs=0, weight_decay=0.0, learning_rate=1e-4, clip=1e9
    )
    (x,) = FEW.split(config.held_out, seed=config.seed)[1].batches(run.dense())
    student = copy.deepcopy(run.model).requires_grad_(requires_grad=True)
    wanted = log_softmax(run.dense()(x), dim=1)
    loss = kl_div(log_softmax(student(x), dim=1), wanted, reduction="batchmean", log_target=True)
    loss.backward()
    torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0.0).step()
    found = finetune(run, FEW, config)
    assert found.history["loss"].iloc[1] == pytest.approx(loss.item(), rel=1e-4)
    assert found.best
    moved = zip(student.parameters(), found.run.model.parameters(), strict=True)
    gaps = torch.cat([(a - b).flatten().abs() for a, b in moved])
    assert gaps.quantile(0.999) < 5e-5
    assert gaps.max() <= 2.1e-4  # a gradient of nothing but rounding steps by its sign


def test_what_has_ended_is_not_worse_than_what_was_begun_with(run):
    tuned = finetune(run, FEW, tuning(learning_rate=1.0, epochs=5, patience=2))
    assert tuned.best == 0
    assert len(tuned.history) == 3
    assert "no lower divergence" in tuned.stopped
    assert same_models(tuned.run.model, run.model)


def test_a_running_mean_of_the_weights_is_what_is_kept(run):
    plain, averaged = (finetune(run, FEW, tuning(ema=e)) for e in (None, 0.9))
    starts, *ends = (
        torch.cat([p.flatten() for p in m.parameters()])
        for m in (run.model, averaged.run.model, plain.run.model)
    )
    assert 0 < (ends[0] - starts).norm() < (ends[1] - starts).norm()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_static_pruning_is_trained_by_the_same_recipe_in_any_precision(run, precision):
    pruned = statically_pruned(run, CALIBRATION)
    tuned = finetune(pruned, IMAGES, tuning(precision=precision))
    assert tuned.history["kl"].min() < tuned.history["kl"].iloc[0]
    assert {p.dtype for p in tuned.run.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, quick()) for name in FAMILIES), ("small_vit", quick(macs_reduction=0.2)),
     ("small_vit", best(attention="low_rank"))],
)  # fmt: skip
def test_every_family_and_recipe_can_be_trained_with_all_losses(name, config):
    run = extract(small(name), toy_images(12), config)
    losses = tuning(epochs=1, held_out=0.2, block_weight=0.5, router="auxiliary")
    history = finetune(run, toy_images(8), losses).history
    assert history["loss"].iloc[1] > 0
    assert history["kl"].notna().all()
    assert not hooks_of(run.dense())


# On disk


def test_a_finished_folder_is_a_run_with_its_history_and_can_be_trained_again(run, saved):
    tuned, folder = saved
    again = load(folder, dense=run.dense())
    assert same_models(again.model, tuned.run.model)
    assert same_models(finetune(run, FEW, tuning()).run.model, tuned.run.model)  # without a folder
    pd.testing.assert_frame_equal(history_of(again), tuned.history)
    pd.testing.assert_frame_equal(pd.read_csv(folder / METRICS), tuned.history)
    assert [p.name for p in folder.parent.iterdir()] == ["tuned"]
    assert set(contents(folder)) == {"model.safetensors", "run.json", METRICS}
    twice = finetune(tuned.run, FEW, tuning(epochs=1))
    assert len(twice.run.provenance["finetunings"]) == 2
    assert twice.history["kl"].iloc[0] == pytest.approx(tuned.history["kl"].min(), rel=1e-4)


def test_what_has_ended_is_not_repeated_and_nothing_else_takes_its_place(
    run, saved, tmp_path, monkeypatch
):
    (tuned, folder), before = saved, contents(saved[1])
    monkeypatch.setattr(training.Training, "run", lambda _: pytest.fail("trained again"))
    second = finetune(run, FEW, tuning(), out=folder)
    pd.testing.assert_frame_equal(tuned.history, second.history)
    (tmp_path / "file").write_text("")
    for config, out in ((tuning(seed=3), folder), (tuning(), tmp_path / "file")):
        with pytest.raises(MoeeError, match="another folder"):
            finetune(run, FEW, config, out=out)
    assert contents(folder) == before


def interrupted(monkeypatch, last, *arguments, out):
    """Fine-tune until the epoch ``last`` begins."""
    epoch = training.Training._train_epoch

    def broken(self, number):
        if number == last:
            raise KeyboardInterrupt
        return epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_train_epoch", broken)
        with pytest.raises(KeyboardInterrupt):
            finetune(*arguments, out=out)
    assert not out.exists()
    assert len(read_checkpoint(unfinished_folder(out))[0]["rows"]) == last


@pytest.mark.parametrize(
    "settings",
    [{"ema": 0.8, "router": "straight_through"}, {"augmentation": "strong", "accumulate": 2}],
)
def test_a_training_that_was_interrupted_comes_to_the_same_bytes_and_no_other_goes_on_with_it(
    run, tmp_path, monkeypatch, settings
):
    config, whole, parts = tuning(epochs=3, **settings), tmp_path / "whole", tmp_path / "parts"
    finetune(run, FEW, config, out=whole)
    for last in (1, 2, 3):
        interrupted(monkeypatch, last, run, FEW, config, out=parts)
        begun = contents(unfinished_folder(parts))
        with pytest.raises(MoeeError, match="was begun"):
            finetune(run, FEW, replace(config, seed=5), out=parts)
        assert contents(unfinished_folder(parts)) == begun
    np.random.default_rng().random()
    torch.rand(3)
    finetune(run, FEW, config, out=parts)
    assert contents(parts) == contents(whole)


def breaking(monkeypatch, epoch):
    """Let the images of one epoch be such that no loss is finite."""
    whole = training.Loop.update

    def broken(self, step, parts, loss):
        broke = step // 2 + 1 == epoch  # two steps an epoch
        return whole(self, step, [part * math.nan if broke else part for part in parts], loss)

    monkeypatch.setattr(training.Loop, "update", broken)


def test_a_loss_that_is_not_finite_ends_the_training_and_the_best_epoch_is_kept(
    run, tmp_path, monkeypatch
):
    good = finetune(run, FEW, tuning(epochs=3))
    breaking(monkeypatch, epoch=3)
    tuned = finetune(run, FEW, tuning(epochs=3), out=tmp_path / "tuned")
    assert tuned.stopped == "the loss was not finite in epoch 3"
    assert not tuned.finite
    assert tuned.best in (1, 2)
    pd.testing.assert_frame_equal(tuned.history, good.history.iloc[:3])
    kept = load(tmp_path / "tuned", dense=run.dense()).model
    assert all(p.isfinite().all() for p in kept.parameters())


def test_a_loss_that_was_never_finite_or_too_few_images_leave_nothing(run, tmp_path, monkeypatch):
    breaking(monkeypatch, epoch=1)
    with pytest.raises(MoeeError, match="lower the learning rate"):
        finetune(run, FEW, tuning(), out=tmp_path / "tuned")
    with pytest.raises(MoeeError, match="held_out"):
        finetune(run, FEW.take(range(3)), tuning(), out=tmp_path / "tuned")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", [
    {"epochs": 0}, {"learning_rate": 0.0}, {"router": "thawed"}, {"augmentation": "wild"},
    {"ema": 1.0}, {"held_out": 0.0}, {"precision": "float16"}, {"block_weight": -1.0},
    {"accumulate": 0}, {"patience": 0}, {"learning_rate": math.inf}, {"batch_size": 2.5},
])  # fmt: skip
def test_settings_out_of_their_range_are_refused(setting):
    with pytest.raises(MoeeError, match=next(iter(setting))):
        FinetuneConfig(**setting)
