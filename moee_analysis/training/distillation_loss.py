"""What every image costs a model in training, as its configuration says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from moee_analysis.training.distillation import (
    block_errors,
    block_outputs,
    compared_blocks,
    divergences,
)
from moee_analysis.training.finetune_config import FinetuneConfig
from moee_analysis.training.train_routers import choice_loss, seen_by_learners, straight_through

Losses = Callable[[torch.Tensor], torch.Tensor]


@contextmanager
def losses_of(student: nn.Module, dense: nn.Module, config: FinetuneConfig) -> Iterator[Losses]:
    """While open, the yielded function runs both models on images (n, ...) and tells losses (n,).

    Hooks watch what the losses look at beside the logits; they come off on leaving.
    """
    blocks = compared_blocks(dense) if config.block_weight else ()
    with ExitStack() as stack:
        of_dense = stack.enter_context(block_outputs(dense, blocks))
        of_student = stack.enter_context(block_outputs(student, blocks))
        learners = {}
        if config.router == "straight_through":
            stack.enter_context(straight_through(student))
        elif config.router == "auxiliary":
            learners = stack.enter_context(seen_by_learners(student))

        def losses(x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                wanted = dense(x)
            found = divergences(student(x), wanted, temperature=config.temperature)
            if blocks:
                found = found + config.block_weight * block_errors(of_student, of_dense, len(x))
            if learners:
                found = found + config.router_weight * choice_loss(learners, dense)
            return found

        yield losses
