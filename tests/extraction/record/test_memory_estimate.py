from __future__ import annotations

import resource
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.record import calibration_set as calibration
from moee_analysis.extraction.record import recording
from moee_analysis.extraction.record.calibration_set import Calibration, Limits
from moee_analysis.extraction.record.memory_estimate import Memory, expected, most_experts
from tests.helpers.images import toy_images
from tests.helpers.models import lively, toy_vit
from tests.helpers.processes import processes
from tests.helpers.runs import best, quick

NOWHERE = Limits(disk=0)
TOKENS, DIM, HIDDEN, LAYERS = 17, 32, 64, 3


def told(config, tmp_path, **settings):
    return expected(Calibration(toy_vit(), toy_images(40), config.resolved(), tmp_path, **settings))


@pytest.mark.parametrize("limits", [Limits(), NOWHERE], ids=["on disk", "made again"])
def test_the_formula_with_the_numbers_of_a_toy(tmp_path, limits):
    found = told(best(cluster_tokens=100), tmp_path, limits=limits)
    parameters = sum(p.numel() for p in toy_vit().parameters())
    of_token = 4 * (8 * DIM + 3 * HIDDEN)
    experts = 4 + 2
    assert found.weights == 2 * 4 * parameters
    assert found.activations == recording.BATCH * LAYERS * TOKENS * of_token
    part = Calibration(toy_vit(), toy_images(40), best().resolved(), tmp_path).bytes_of(40)
    assert found.tokens == LAYERS * 4 * 100 * DIM + 3 * 8 * 8192 * HIDDEN + part
    drawn = 100 * DIM + 2 * DIM**2
    of_experts = experts * (2 * HIDDEN + DIM**2) + 2 * DIM**2
    assert found.sums == 8 * LAYERS * max(drawn, of_experts, 2 * HIDDEN**2)
    assert found.total == found.weights + found.activations + found.tokens + found.sums


def test_sums_take_what_they_may_but_one_layer_at_least(tmp_path):
    whole = told(best(), tmp_path).sums
    some = told(best(), tmp_path, limits=Limits(memory=whole / 2)).sums
    least = told(best(), tmp_path, limits=Limits(memory=1)).sums
    assert (some, least) == (whole / 2, pytest.approx(whole / LAYERS))


@pytest.mark.parametrize(
    ("config", "most"),
    [(best(), 6), (best(experts="one"), 2), (quick(), 22), (best(clustering=None), 7)],
)
def test_the_most_experts_a_layer_can_have(config, most):
    site = Calibration(toy_vit(), toy_images(2), config.resolved(), None).sites[0]
    assert most_experts(site, config.resolved()) == most


def test_it_is_told_before_a_run(capsys):
    extract(toy_vit(), toy_images(8), best())
    (line, *_) = capsys.readouterr().out.splitlines()
    assert line.startswith("memory, at most about")
    assert all(f"{name} 0.0" in line for name in vars(Memory(0, 0, 0, 0)))


def peak_of(images, limits):
    """The most bytes that a process has had that extracts from so many images."""
    torch.set_num_threads(1)
    calibration.PART = recording.BATCH = 8
    extract(lively(), toy_images(images), best(macs_reduction=0.3), limits=limits)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("limits", [Limits(), NOWHERE], ids=["on disk", "made again"])
def test_memory_does_not_grow_with_the_number_of_images(limits):
    few, many = (
        ProcessPoolExecutor(1, mp_context=processes()).submit(peak_of, images, limits).result()
        for images in (64, 384)
    )
    one = Calibration(lively(), toy_images(8), best().resolved(), None).bytes_of(1)
    assert many - few < 0.25 * 320 * one
