"""Models as they are evaluated: nothing drops out, and every module gets its own flag back."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def in_evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, with or without gradients as it was; every module gets its own flag back."""
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        yield
    finally:
        for module, training in flags.items():
            module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with in_evaluation_mode(model), torch.no_grad():
        yield
