"""What a hidden neuron is worth to an expert: one score for every neuron of every expert."""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.experts.layer_experts import ExpertStatistics, LayerExperts
from moee_analysis.extraction.experts.obs import elimination_costs, expert_covariances
from moee_analysis.extraction.record.accumulate import Arrays, share_out, stored_arrays
from moee_analysis.extraction.record.fisher import importance, root
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key


def score_neurons(
    tokens: TokenSource, layers: Sequence[LayerExperts], *, order: str, metric: str
) -> dict[str, np.ndarray]:
    """Score the neurons of the experts of all converted layers, (experts, hidden), by site name.

    With the orders ``weighted`` and ``obs`` a score is the cost of dropping the neuron per token,
    in squared error of the outputs or, in the Fisher ``metric``, about in nats.
    """
    layers = [layer for layer in layers if layer.converted]
    if order == "obs":
        return removal_costs(tokens, layers, metric=metric)
    return {
        layer.site.name: score_alone(layer.site.module(tokens.model), layer.statistics, order)
        for layer in progress(layers, label="scoring neurons")
    }


def score_alone(mlp: Mlp, statistics: ExpertStatistics, order: str) -> np.ndarray:
    """Score each neuron by what it does by itself, (experts, hidden).

    ``magnitude`` |W1_j| |W2_j|, the same for all experts and without any data; ``variance`` of the
    activation (MoEE); ``weighted``, variance times W2_j^T Q W2_j, what dropping the neuron alone
    adds to the error once its mean is kept (in the Fisher metric the diagonal of its information).
    Q is the identity where there is no metric.
    """
    W1, W2 = _matrix(mlp.fc1), _matrix(mlp.fc2)
    if order == "magnitude":
        return np.tile((W1.norm(dim=1) * W2.norm(dim=0)).numpy(), (len(statistics.routed), 1))
    if order == "variance":
        return statistics.variance
    weights = torch.stack([importance(W2, Q) for Q in metrics_of(mlp, statistics)])
    return statistics.variance * weights.numpy()


def metric_of(mlp: Mlp, statistics: ExpertStatistics, expert: int) -> torch.Tensor:
    """The metric Q of an expert's outputs, float64 (dim, dim)."""
    if statistics.metrics is None:
        return torch.eye(mlp.fc2.out_features, dtype=torch.float64)
    return torch.from_numpy(np.array(statistics.metrics[expert], dtype=np.float64))


def metrics_of(mlp: Mlp, statistics: ExpertStatistics) -> Iterator[torch.Tensor]:
    """Yield the metric of every expert's outputs, float64 (dim, dim)."""
    return (metric_of(mlp, statistics, expert) for expert in range(len(statistics.routed)))


def removal_costs(
    tokens: TokenSource, layers: Sequence[LayerExperts], *, metric: str
) -> dict[str, np.ndarray]:
    """Costs of removing each neuron of every expert, by :func:`elimination_costs`, or stored ones.

    Float64 (experts, hidden), by site name.
    """

    def costs_of(task: tuple[LayerExperts, int, torch.Tensor]) -> torch.Tensor:
        layer, expert, covariance = task
        mlp = layer.site.module(tokens.model)
        readout = root(metric_of(mlp, layer.statistics, expert)) @ _matrix(mlp.fc2)
        return elimination_costs(covariance, readout)

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        chosen = [layer for layer in layers if layer.site.name in missing]
        counts = [layer.assignment.experts for layer in chosen]
        found = expert_covariances(tokens, chosen, label="covariances of neurons")
        tasks = progress(found, label="eliminating neurons", total=sum(counts))
        costs = iter(share_out(tasks, costs_of, lambda task: task[2].new_zeros(len(task[2]))))
        for layer, count in zip(chosen, counts, strict=True):
            rows = torch.stack([next(costs) for _ in range(count)])
            yield layer.site.name, {"costs": rows.numpy()}

    folders = {}
    for layer in layers:
        facts = {"site": layer.site.name, "experts": layer.assignment.digest}
        key = content_key(tokens=tokens.key, metric=metric, **facts)
        folders[layer.site.name] = f"costs-{key}"
    files = stored_arrays(tokens.root, folders, compute)
    return {name: np.load(arrays["costs"]) for name, arrays in files.items()}


def _matrix(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().double().cpu()
