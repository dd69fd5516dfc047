import math

import pytest
import torch

from moee_analysis.models.capture import capture
from moee_analysis.training.distillation import block_errors, compared_blocks, divergences
from tests.helpers.models import toy_moe, toy_swin, toy_vit

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
    low = 30 * student.bfloat16(), 30 * dense.bfloat16()  # the softmax is of full precision
    assert torch.equal(divergences(*low), divergences(*(each.float() for each in low)))


def test_blocks_whose_patches_nothing_reads_are_not_compared():
    assert compared_blocks(toy_vit()) == ("blocks.0", "blocks.1")
    assert compared_blocks(toy_swin()) == ("layers.0.blocks.0", "layers.1.blocks.0")


def test_errors_of_blocks_are_relative_and_of_each_image():
    dense, student = toy_vit(), toy_moe(toy_vit())
    names = compared_blocks(dense)
    with capture(dense, names, "outputs") as wanted, capture(student, names, "outputs") as found:
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
    windows = torch.randn(6, 4, 3, generator=torch.Generator().manual_seed(0))
    off = windows.clone()
    off[2:4] *= 1.1  # the second image of three, in two windows
    errors = block_errors({"b": off}, {"b": windows}, 3)
    assert errors.tolist() == pytest.approx([0, 0.01, 0], abs=1e-6)
