"""One update of a model after the other, as fine-tuning and supervised training make them."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from timm.scheduler.scheduler import Scheduler

from moee_analysis.utils.distributed import all_sum, sum_gradients

NOT_FINITE = "the loss was not finite"


@dataclass(frozen=True)
class Loop:
    """Updates of ``parameters``; ``clip`` is the largest norm of the gradient of the mean loss."""

    parameters: list[torch.Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: Scheduler
    clip: float

    def update(
        self, step: int, parts: Iterable[Any], loss: Callable[[Any], tuple[torch.Tensor, float]]
    ) -> tuple[float, float] | None:
        """Make update ``step``, from 0; return the sums of all losses and weights, or None.

        ``loss`` takes a part of the batch to the sum of its losses and their weight, such as their
        number. The parts of all processes are one batch. None: a loss, or the gradient, is not
        finite, and nothing was changed.
        """
        self.scheduler.step_update(step)
        self.optimizer.zero_grad(set_to_none=True)
        sums = torch.zeros(2, dtype=torch.float64)
        for part in parts:
            total, weight = loss(part)
            total.backward()
            sums += torch.tensor([total.item(), weight], dtype=torch.float64)
        total, weight = all_sum(sums).tolist()
        sum_gradients(self.parameters)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.clip * weight).item()
        if not (math.isfinite(norm) and math.isfinite(total)):
            return None
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad /= weight
        self.optimizer.step()
        return total, weight
