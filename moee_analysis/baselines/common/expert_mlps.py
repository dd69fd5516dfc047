"""Experts with weights of their own: many MLPs of one shape, computed as batched products."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers import Mlp
from torch import nn


class ExpertMlps(nn.Module):
    """E Linear-activation-Linear MLPs, each of which sees inputs of its own.

    Their weights are copies of those of ``mlps``, which have one shape: ``fc1_weight`` (experts,
    hidden, dim), ``fc1_bias`` (experts, hidden), ``fc2_weight`` (experts, dim, hidden) and
    ``fc2_bias`` (experts, dim). ``drop`` is the rate at which hidden activations, and outputs, drop
    out in training.
    """

    def __init__(self, mlps: Sequence[Mlp], act: nn.Module, *, drop: float = 0.0) -> None:
        super().__init__()
        for layer in ("fc1", "fc2"):
            linear = [getattr(mlp, layer) for mlp in mlps]
            weight = torch.stack([each.weight.detach() for each in linear])
            bias = torch.stack([_bias(each) for each in linear])
            self.register_parameter(f"{layer}_weight", nn.Parameter(weight))
            self.register_parameter(f"{layer}_bias", nn.Parameter(bias))
        self.act = act
        self.drop = nn.Dropout(drop)

    @property
    def n_experts(self) -> int:
        """Number of experts."""
        return len(self.fc1_weight)

    @property
    def hidden(self) -> int:
        """Hidden neurons of each expert."""
        return self.fc1_weight.shape[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs (images, experts, inputs of each, dim) to outputs of the same shape."""
        own = x.transpose(0, 1).flatten(1, 2)  # (experts, all inputs of each, dim)
        return self._batched(own).unflatten(1, (x.shape[0], x.shape[2])).transpose(0, 1)

    def in_turn(self, x: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Map inputs (n, dim), sorted by expert, to their outputs; ``counts`` are those of each."""
        if len(set(counts)) == 1:
            return self._batched(x.unflatten(0, (self.n_experts, counts[0]))).flatten(0, 1)
        stacked = self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias
        # taken apart at once: the gradient of a single expert's slice is as large as them all
        weights = zip(*(each.unbind() for each in stacked), strict=True)
        return torch.cat([self._one(*own) for own in zip(x.split(counts), weights, strict=True)])

    def _batched(self, x: torch.Tensor) -> torch.Tensor:
        """Map inputs (experts, inputs of each, dim)."""
        hidden = torch.baddbmm(self.fc1_bias[:, None], x, self.fc1_weight.mT)
        hidden = self.drop(self.act(hidden))
        return self.drop(torch.baddbmm(self.fc2_bias[:, None], hidden, self.fc2_weight.mT))

    def _one(self, x: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
        """Map the inputs (n, dim) of one expert."""
        fc1_weight, fc1_bias, fc2_weight, fc2_bias = weights
        hidden = self.drop(self.act(nn.functional.linear(x, fc1_weight, fc1_bias)))
        return self.drop(nn.functional.linear(hidden, fc2_weight, fc2_bias))


def _bias(linear: nn.Linear) -> torch.Tensor:
    if linear.bias is None:
        return linear.weight.new_zeros(linear.out_features)
    return linear.bias.detach()
