"""The experts of a layer, before any neuron is dropped."""

from dataclasses import dataclass, field

import numpy as np
from torch import nn

from moee_analysis.extraction.cluster.clusters_to_router import Assignment, Partition
from moee_analysis.extraction.experts.expert_statistics import ExpertStatistics
from moee_analysis.models.loading import MlpSite
from moee_analysis.moe.routers import TokenKindRouter


@dataclass(frozen=True)
class LayerExperts:
    """Which tokens of a layer share an expert; all experts are still the whole MLP.

    ``tokens`` of an image pass through the layer; where it is ``unread``, nothing reads the
    outputs at the patches. Experts of leading tokens (``prefix``: the expert of each) come before
    those of the ``partition``. ``statistics`` are None where the layer stays dense.
    """

    site: MlpSite
    tokens: int
    prefix: tuple[int, ...] = ()
    unread: bool = False
    partition: Partition = field(default_factory=Partition)
    statistics: ExpertStatistics | None = None

    @property
    def converted(self) -> bool:
        """Whether this layer becomes a mixture of experts; the partition's reason says why not."""
        return self.statistics is not None

    @property
    def assignment(self) -> Assignment:
        """Which expert every token of the layer goes to."""
        return Assignment(self.prefix, self.partition)

    @property
    def constant(self) -> np.ndarray:
        """Which experts keep no neuron, bool (experts,): those of tokens that nothing reads."""
        return (self.assignment.kinds == 1) & self.unread

    def router(self) -> nn.Module:
        """Return a new router of this layer."""
        router = self.partition.router()
        return TokenKindRouter(self.prefix, router, tokens=self.tokens) if self.prefix else router
