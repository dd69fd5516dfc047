from __future__ import annotations

import math

import pytest
import torch

from moee_analysis.training.distillation import (
    block_errors,
    block_outputs,
    compared_blocks,
    divergences,
)
from tests.helpers.models import hooks_of, toy_moe, toy_swin, toy_vit

X = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def slow_divergence(student, dense, temperature):
    total = 0.0
    p = [math.exp(v / temperature) for v in dense]
    q = [math.exp(v / temperature) for v in student]
    for a, b in zip(p, q, strict=True):
        total += a / sum(p) * math.log(a / sum(p) / (b / sum(q)))
    return temperature**2 * total


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_divergences_are_those_of_the_definition(temperature):
    student, dense = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(1)).double()
    found = divergences(student, dense, temperature=temperature)
    wanted = [
        slow_divergence(s, d, temperature)
        for s, d in zip(student.tolist(), dense.tolist(), strict=True)
    ]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert divergences(dense, dense).abs().max() < 1e-6


def test_half_precision_loses_nothing_to_the_softmax():
    student, dense = 30 * torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(1))
    found = divergences(student.bfloat16(), dense.bfloat16())
    wanted = divergences(student.bfloat16().float(), dense.bfloat16().float())
    assert torch.equal(found, wanted)


def test_blocks_whose_patches_nothing_reads_are_not_compared():
    assert compared_blocks(toy_vit()) == ("blocks.0", "blocks.1")
    assert compared_blocks(toy_swin()) == ("layers.0.blocks.0", "layers.1.blocks.0")


def test_outputs_of_blocks_are_watched_and_no_hook_stays():
    model = toy_vit()
    before = hooks_of(model)
    with block_outputs(model, ["blocks.1"]) as seen:
        model(X)
        assert hooks_of(model) == before + 1
    assert hooks_of(model) == before
    wanted = model.blocks[:2](model._pos_embed(model.patch_embed(X)))
    torch.testing.assert_close(seen["blocks.1"], wanted)


def test_errors_of_blocks_are_relative_and_of_each_image():
    dense, student = toy_vit(), toy_moe(toy_vit())
    names = compared_blocks(dense)
    with block_outputs(dense, names) as wanted, block_outputs(student, names) as found:
        dense(X)
        student(X)
    errors = block_errors(found, wanted, 5)
    slow = [
        sum(
            float((found[n][i] - wanted[n][i]).square().sum() / wanted[n][i].square().sum())
            for n in names
        )
        / len(names)
        for i in range(5)
    ]
    assert errors.tolist() == pytest.approx(slow, rel=1e-5)
    assert block_errors(wanted, wanted, 5).tolist() == [0.0] * 5


def test_windows_are_those_of_their_image():
    windows = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    off = windows.clone()
    off[2:4] *= 1.1  # the second image of three
    errors = block_errors({"b": off}, {"b": windows}, 3)
    assert errors.tolist() == pytest.approx([0, 0.01, 0], abs=1e-6)
