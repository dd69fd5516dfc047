"""Fine-tuning in many processes, and in processes that are killed."""

import signal

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import load
from moee_analysis.models.loading import load_model
from moee_analysis.training.config import FinetuneConfig
from moee_analysis.training.finetune import finetune
from moee_analysis.training.trainer import METRICS
from moee_analysis.utils import distributed
from moee_analysis.utils.distributed import sum_gradients
from tests.helpers.images import contents, toy_images
from tests.helpers.models import SMALL_VIT, lively
from tests.helpers.processes import ended_at
from tests.helpers.ranks import run_ranks, tune_toy
from tests.helpers.runs import quick


def test_any_number_of_processes_learns_the_same(tmp_path):
    one, two = tmp_path / "1", tmp_path / "2"
    for folder in (one, two):
        folder.mkdir()
    tune_toy(one)
    run_ranks(2, tune_toy, two)
    models = [load_file(path) for folder in (one, two) for path in sorted(folder.glob("tuned-*"))]
    assert len(models) == 3
    histories = [pd.read_csv(folder / "run" / METRICS) for folder in (one, two)]
    pd.testing.assert_frame_equal(*histories, rtol=1e-3)
    assert histories[0]["kl"].nunique() == 3
    for name, tensor in models[0].items():
        torch.testing.assert_close(tensor, models[1][name], rtol=1e-3, atol=1e-4)
        assert torch.equal(models[1][name], models[2][name])


def test_gradients_of_all_processes_are_summed(monkeypatch):
    weights = [torch.ones(2, 3), torch.ones(4)]
    weights[0].grad = torch.arange(6.0).reshape(2, 3)
    monkeypatch.setattr(distributed, "processes", lambda: 2)
    monkeypatch.setattr(distributed, "all_sum", lambda t: t.mul_(2))
    sum_gradients(weights)
    assert torch.equal(weights[0].grad, 2 * torch.arange(6.0).reshape(2, 3))
    assert torch.equal(weights[1].grad, torch.zeros(4))


def tune(saved, out):
    """Fine-tune a saved run on one thread."""
    torch.set_num_threads(1)
    config = FinetuneConfig(epochs=3, batch_size=4, learning_rate=1e-5, ema=0.9, patience=9)
    finetune(load(saved), toy_images(20), config, out=out)


@pytest.fixture
def saved(tmp_path):
    """A saved run whose dense weights are in a file."""
    save_file(lively().state_dict(), tmp_path / "dense.safetensors")
    dense = load_model(SMALL_VIT, weights=tmp_path / "dense.safetensors")
    extract(dense, toy_images(), quick()).save(tmp_path / "saved")
    return tmp_path / "saved"


def test_a_training_killed_at_random_moments_comes_to_the_same_bytes(saved, tmp_path):
    """Each time before a file is flushed; ``test_finetune`` interrupts epochs."""
    whole, out = tmp_path / "whole", tmp_path / "tuned"
    assert ended_at(0, 0, tune, saved, whole) == 0
    kills = 0
    for step in np.random.default_rng(0).integers(1, 9, size=6):
        kills += ended_at(int(step), signal.SIGKILL, tune, saved, out) != 0
        assert not out.exists() or contents(out) == contents(whole)
    assert kills > 1
    assert ended_at(0, 0, tune, saved, out) == 0
    assert contents(out) == contents(whole)
