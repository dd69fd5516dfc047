import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from moee_analysis.baselines.common.exchange import ExpertMlps
from moee_analysis.baselines.common.soft_moe_layer import SlotMlp, SpheroRouter
from moee_analysis.baselines.sparse_upcycling import (
    SparseUpcyclingConfig,
    convert,
    importance_loss,
    watch_routers,
)
from moee_analysis.errors import MoeeError
from moee_analysis.training.batches import Loaded
from moee_analysis.training.config import SupervisedConfig
from moee_analysis.training.loop import Loop
from moee_analysis.training.supervised import parameter_groups, right_of, train
from tests.helpers.images import toy_images
from tests.helpers.models import random_states, same_models, toy_vit

IMAGES = toy_images(48)
TRAINING, CHECK = IMAGES.take(range(30)), IMAGES.take(range(30, 48))
QUICK = SupervisedConfig(steps=4, batch_size=8, learning_rate=1e-3, check_every=2)


def slotted():
    """A ViT, one of its MLPs copied into experts on slots that are noisy in training."""
    model = toy_vit()
    mlp = model.blocks[1].mlp
    experts = ExpertMlps([mlp] * 3, mlp.act, drop=0.2)
    model.blocks[1].mlp = SlotMlp(SpheroRouter(32, 3, noise=0.1), [experts])
    return model.eval()


def test_the_loss_falls_and_the_images_are_learnt():
    config = SupervisedConfig(
        steps=60, batch_size=10, learning_rate=3e-3, augmentation="none", check_every=20
    )
    trained = train(slotted(), TRAINING, config, check=TRAINING)
    history, losses = trained.history, trained.history["loss"].tolist()
    assert math.isnan(losses[0])
    assert losses[1] > losses[2] > losses[3]
    assert history["top1"].iloc[-1] > 0.9
    assert history["step"].tolist() == [0, 20, 40, 60]
    assert history["images"].tolist() == [0, 200, 400, 600]
    assert history["epoch"].tolist() == pytest.approx([0, 20 / 3, 40 / 3, 20])
    assert trained.right.shape == (4, len(TRAINING))
    assert trained.right.mean(axis=1).tolist() == history["top1"].tolist()
    assert right_of(trained.model, TRAINING).double().mean() == history["top1"].iloc[-1]


@pytest.mark.parametrize(
    "changed",
    [{}, {"augmentation": "light", "layer_decay": 0.6}, {"mixup": 0.8, "cutmix": 1.0}],
    ids=str,
)
def test_the_same_bytes_whatever_random_state_is_met_and_all_are_given_back(changed):
    model, config, met = slotted(), replace(QUICK, **changed), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = random_states()
        met.append(train(model, TRAINING, config, check=CHECK))
        assert random_states() == before
    assert same_models(met[0].model, met[1].model)
    assert met[0].history.equals(met[1].history)
    other = train(model, TRAINING, replace(config, seed=1), check=CHECK)
    assert not same_models(met[0].model, other.model)


def test_the_given_model_stays_and_its_copy_is_as_free_and_quiet_as_it_was():
    model = slotted().requires_grad_(requires_grad=False)
    model.head.weight.requires_grad_(requires_grad=True)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained = train(model, Loaded.of(TRAINING, model), QUICK, check=Loaded.of(CHECK, model)).model
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [n for n, p in trained.named_parameters() if p.requires_grad] == ["head.weight"]
    assert not any(m.training for m in trained.modules())
    assert all(p.grad is None for p in trained.parameters())
    assert not [n for n, learnt in trained.state_dict().items() if torch.equal(before[n], learnt)]


def test_a_loss_that_is_not_finite_and_no_images_are_refused_and_nothing_is_left_behind():
    model, before = slotted().requires_grad_(requires_grad=False), random_states()
    model.head.weight.fill_(math.inf)
    with pytest.raises(MoeeError, match="finite"):
        train(model, TRAINING, QUICK, check=CHECK)
    assert random_states() == before
    assert not any(m.training for m in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(MoeeError, match="at least one image"):
        train(toy_vit(), TRAINING.take([]), QUICK, check=CHECK)


def test_top_k_routers_learn_to_use_their_experts_alike():
    """Experts that start alike are chosen by chance; the loss evens that out."""
    upcycling = SparseUpcyclingConfig(experts=4, k=1, router="top_k", layers=(1,))
    model, uneven = convert(toy_vit(), TRAINING, upcycling), []
    model.blocks[1].mlp.router.gate.weight.data.mul_(20)
    for weight in (0.0, 1.0):
        config = replace(QUICK, steps=60, learning_rate=3e-3, balance_weight=weight)
        trained = train(model, TRAINING, config, check=CHECK).model
        with watch_routers(trained) as routed:
            right_of(trained, CHECK)
        uneven.append(importance_loss(routed[trained.blocks[1].mlp.router].logits).item())
    assert uneven[1] < 0.5 * uneven[0]


def test_rates_and_decay_by_group():
    model = slotted()
    groups = parameter_groups(model, replace(QUICK, layer_decay=0.5))
    found = {n: (g["lr_scale"], g["weight_decay"]) for g in groups for n, _ in g["params"]}
    assert set(found) == {name for name, _ in model.named_parameters()}
    assert sum(len(g["params"]) for g in groups) == len(found)
    expected = {
        "head.weight": (1.0, 0.05),
        "head.bias": (1.0, 0.0),
        "blocks.2.mlp.fc1.weight": (0.5, 0.05),
        "blocks.0.mlp.fc1.weight": (0.125, 0.05),
        "blocks.0.norm2.weight": (0.125, 0.0),
        "blocks.1.attn.qkv.weight": (0.25, 0.05),
        "blocks.1.norm1.weight": (0.25, 0.0),
        "blocks.1.norm2.weight": (1.0, 0.0),
        "blocks.1.mlp.router.queries": (1.0, 0.05),
        "blocks.1.mlp.router.dispatch_temperature": (1.0, 0.0),
        "blocks.1.mlp.groups.0.fc1_weight": (1.0, 0.05),
        "blocks.1.mlp.groups.0.fc1_bias": (1.0, 0.0),
        "pos_embed": (0.0625, 0.0),
        "cls_token": (0.0625, 0.0),
    }
    assert {name: found[name] for name in expected} == expected
    unnamed = nn.Sequential(nn.Linear(2, 2))
    groups = parameter_groups(unnamed, QUICK)
    assert [[name for name, _ in group["params"]] for group in groups] == [["0.weight"], ["0.bias"]]
    with pytest.raises(MoeeError, match="which layers"):
        parameter_groups(unnamed, replace(QUICK, layer_decay=0.5))


def test_the_learning_rate_warms_up_and_falls_to_one_percent(monkeypatch):
    config, rates = replace(QUICK, steps=50, warmup=0.1, check_every=None, layer_decay=0.5), []
    update = Loop.update

    def watched(self, step, parts, loss):
        found = update(self, step, parts, loss)
        rates.append([g["lr"] / g["lr_scale"] for g in self.optimizer.param_groups])
        return found

    monkeypatch.setattr(Loop, "update", watched)
    looks = train(toy_vit(), TRAINING, config, check=CHECK).history["step"]
    assert looks.tolist() == [0, 50]
    shares = np.array(rates) / config.learning_rate
    np.testing.assert_allclose(shares, shares[:, :1].repeat(shares.shape[1], axis=1))
    warm = np.arange(1, 6) / 6
    cosine = 0.01 + 0.99 * (1 + np.cos(np.pi * np.arange(45) / 44)) / 2
    np.testing.assert_allclose(shares[:, 0], [*warm, *cosine])


@pytest.mark.parametrize("wrong", [
    {"steps": 0}, {"learning_rate": 0.0}, {"layer_decay": 0.0}, {"warmup": 1.0},
    {"label_smoothing": -0.1}, {"augmentation": "wild"}, {"check_every": 0}, {"mixup": -1.0},
    {"mixup": 0.8, "batch_size": 7}, {"batch_size": 1.5}, {"clip": math.nan}, {"seed": -1},
], ids=str)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(MoeeError):
        SupervisedConfig(**wrong)
