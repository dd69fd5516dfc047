"""How the tokens of a layer are clustered."""

from dataclasses import dataclass, replace
from typing import Literal, Self, get_args

from moee_analysis.utils.checks import not_none, one_of, real_number, share, whole_number

Space = Literal["hidden", "inputs"]
Reduction = Literal["umap", "pca", "none"]
Method = Literal["hdbscan", "kmeans", "random"]

METHODS: tuple[str, ...] = get_args(Method)
SPACES: tuple[str, ...] = get_args(Space)
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


@dataclass(frozen=True)
class ClusterConfig:
    """How the tokens of one layer are clustered.

    ``method`` is ``hdbscan``, which finds the number of clusters by itself, ``kmeans``, or
    ``random`` (the control: random tokens as centres). ``space`` is the ``hidden`` activations,
    or the ``inputs`` in the metric of the outputs. ``reduce="none"`` is the paper taken literally;
    on raw activations HDBSCAN calls most tokens noise, so the default reduces with UMAP first.
    Fewer tokens than ``count`` make fewer clusters.
    """

    method: Method = "hdbscan"
    space: Space = "hidden"
    count: int | None = 32  # clusters of k-means, or random centres; None: see ``for_width``
    reduce: Reduction = "umap"
    components: int | None = 8  # dimensions after the reduction; None: see ``for_width``
    neighbors: int = 30  # UMAP's neighbourhood
    epochs: int = 200  # UMAP's optimisation; its own default is 500 below 10,000 tokens
    min_samples: int = 10  # never left to hdbscan's default, which is min_cluster_size
    min_cluster_size: float = 0.01  # as a share of the clustered tokens
    max_cluster_size: float | None = 0.25  # likewise; None lets one cluster take everything
    max_noise: float = 0.8  # a layer with a larger share of noise stays dense

    def __post_init__(self) -> None:
        one_of("method", self.method, METHODS)
        one_of("space", self.space, SPACES)
        one_of("reduce", self.reduce, REDUCTIONS)
        share("min_cluster_size", self.min_cluster_size)
        share("max_noise", self.max_noise)
        if self.max_cluster_size is not None:
            real_number(
                "max_cluster_size", self.max_cluster_size, least=self.min_cluster_size, most=1
            )
        for name, value in not_none(self, "count", "components"):
            whole_number(name, value)
        whole_number("epochs", self.epochs)
        whole_number("min_samples", self.min_samples)
        whole_number("neighbors", self.neighbors, least=2)  # UMAP counts the token itself

    def for_width(self, hidden: int) -> Self:
        """Fill in ``count`` and ``components``, if None, for a layer of ``hidden`` neurons.

        A cluster for every 12 neurons, so that routers and shifts stay small beside the weights,
        and 64 at most, so that every expert has enough tokens to be known by, and to be computed
        with few at a time; a component for every 48 neurons, that is, usually for every 12 inputs.
        """
        count = min(max(hidden // 12, 2), 64) if self.count is None else self.count
        components = max(hidden // 48, 2) if self.components is None else self.components
        return replace(self, count=count, components=components)
