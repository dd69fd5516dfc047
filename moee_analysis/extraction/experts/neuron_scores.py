"""What a hidden neuron is worth to an expert: one score for every neuron of every expert."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from timm.layers import Mlp

from moee_analysis.extraction.cluster.clusters_to_router import Assignment, by_expert
from moee_analysis.extraction.experts.layer_experts import ExpertStatistics, LayerExperts
from moee_analysis.extraction.record import accumulate as sums_over
from moee_analysis.extraction.record.accumulate import TINY, Accumulator, Arrays, Sums
from moee_analysis.extraction.record.fisher import importance, root
from moee_analysis.extraction.record.token_source import TokenSource
from moee_analysis.extraction.record.tokens import RecordedLayer
from moee_analysis.models.loading import MlpSite
from moee_analysis.utils.progress import progress

RIDGE = 1e-3
BLOCK = 24  # every step removes one in so many of the neurons that are left
SQUEEZE = 0.7  # once fewer columns are in use, the others are left out: copying takes longest
CHUNK = 16384  # tokens whose products are added up at a time


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

    ``magnitude`` |W1_j| |W2_j|, without any data; ``variance`` of the activation (MoEE);
    ``weighted``, variance times W2_j^T Q W2_j: what dropping the neuron alone adds to the error,
    its mean being kept. Q is the identity where there is no metric.
    """
    W1, W2 = _matrix(mlp.fc1), _matrix(mlp.fc2)
    if order == "magnitude":
        return np.tile((W1.norm(dim=1) * W2.norm(dim=0)).numpy(), (len(statistics.routed), 1))
    if order == "variance":
        return statistics.variance
    weights = torch.stack([importance(W2, Q) for Q in find_metrics(mlp, statistics)])
    return statistics.variance * weights.numpy()


def find_metric(mlp: Mlp, statistics: ExpertStatistics, expert: int) -> torch.Tensor:
    """The metric Q of an expert's outputs, float64 (dim, dim)."""
    if statistics.metrics is None:
        return torch.eye(mlp.fc2.out_features, dtype=torch.float64)
    return torch.from_numpy(np.array(statistics.metrics[expert], dtype=np.float64))


def find_metrics(mlp: Mlp, statistics: ExpertStatistics) -> Iterator[torch.Tensor]:
    """Yield the metric of every expert's outputs."""
    return (find_metric(mlp, statistics, expert) for expert in range(len(statistics.routed)))


def removal_costs(
    tokens: TokenSource, layers: Sequence[LayerExperts], *, metric: str
) -> dict[str, np.ndarray]:
    """Costs of :func:`elimination_costs`, (experts, hidden), or stored ones, by site name."""

    def costs_of(task: tuple[LayerExperts, int, torch.Tensor]) -> torch.Tensor:
        layer, expert, covariance = task
        mlp = layer.site.module(tokens.model)
        readout = root(find_metric(mlp, layer.statistics, expert)) @ _matrix(mlp.fc2)
        return elimination_costs(covariance, readout)

    def compute(missing: list[str]) -> Iterable[tuple[str, Arrays]]:
        chosen = [layer for layer in layers if layer.site.name in missing]
        counts = [layer.assignment.experts for layer in chosen]
        found = gather_covariances(tokens, chosen, label="covariances of neurons")
        tasks = progress(found, label="eliminating neurons", total=sum(counts))
        done = sums_over.share_out(tasks, costs_of, lambda task: task[2].new_zeros(len(task[2])))
        costs = iter(done)
        for layer, count in zip(chosen, counts, strict=True):
            rows = torch.stack([next(costs) for _ in range(count)])
            yield layer.site.name, {"costs": rows.numpy()}

    facts = {layer.site.name: {"experts": layer.assignment.digest} for layer in layers}
    for name, own in facts.items():
        own |= {"site": name, "tokens": tokens.key, "metric": metric}
    found = sums_over.stored_arrays(tokens.root, "costs", facts, compute)
    return {name: arrays["costs"] for name, arrays in found.items()}


@dataclass(frozen=True)
class CovarianceAccumulator(Accumulator):
    """Products of deviations from ``means`` (all experts, hidden), of some ``experts``."""

    site: MlpSite
    assignment: Assignment
    experts: range
    means: np.ndarray
    gradients: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the products (experts, hidden, hidden) and the numbers of tokens (experts,)."""
        count, hidden = len(self.experts), self.site.hidden
        return {"products": (count, hidden, hidden), "weight": (count,)}

    def update(self, sums: Sums, layer: RecordedLayer) -> None:
        """Add a part of the tokens."""
        _, members = self.assignment.of(layer)
        of_expert = by_expert(members, self.assignment.experts)
        for place, expert in enumerate(self.experts):
            mean = torch.from_numpy(self.means[expert]).float().to(layer.device)
            for rows in layer.chunks(of_expert[expert], size=CHUNK):
                deviation = layer.hidden(rows) - mean  # float32 loses nothing to a large mean
                weight = torch.from_numpy(layer.sample.mass(rows)).to(layer.device)
                sums["products"][place] += ((deviation * weight[:, None]).T @ deviation).cpu()
                sums["weight"][place] += weight.sum(dtype=torch.float64)

    def compute(self, sums: Sums) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield every expert and its covariance, float64 (hidden, hidden)."""
        for place, expert in enumerate(self.experts):  # one at a time: they are large
            yield expert, sums["products"][place] / sums["weight"][place].clamp_min(TINY)


def gather_covariances(
    tokens: TokenSource, layers: Sequence[LayerExperts], *, label: str
) -> Iterator[tuple[LayerExperts, int, torch.Tensor]]:
    """Yield layer, expert and covariance, float64 (hidden, hidden), of all experts in order."""
    accumulators = []
    for layer in layers:
        fitting = max(1, int(tokens.limits.memory // (8 * layer.site.hidden**2)))
        experts, means = range(layer.assignment.experts), layer.statistics.means
        accumulators += [
            CovarianceAccumulator(layer.site, layer.assignment, experts[few : few + fitting], means)
            for few in experts[::fitting]
        ]
    by_site = {layer.site: layer for layer in layers}
    for site, covariances in sums_over.accumulate(tokens, accumulators, label=label):
        for expert, covariance in covariances:
            yield by_site[site], expert, covariance


def elimination_costs(
    covariance: torch.Tensor, readout: torch.Tensor, *, ridge: float = RIDGE, block: int = BLOCK
) -> torch.Tensor:
    """What it costs to remove each neuron, given that all cheaper ones are gone already.

    Optimal Brain Surgeon (Hassibi & Stork, 1993) with whole neurons in the place of weights, the
    least-squares refit built in. With P = (C + r I)^-1 and the current readout V, removing neuron j
    alone and refitting the rest raises the squared error of V a by |V_j|^2 / P_jj. Of the neurons
    left, the cheapest 1/``block`` (at least one) go at a time; then V_A -= V_B P_BB^-1 P_BA and
    P_AA -= P_AB P_BB^-1 P_BA for those that stay.

    ``covariance`` is C, (hidden, hidden); ``readout`` (outputs, hidden) are the output weights in a
    metric in which errors are plain squares; ``ridge`` is r over the mean diagonal of C. In the
    order of removal the costs, float64 (hidden,), never fall.
    """
    inverse, readout = _inverse(covariance.double(), ridge), readout.double().clone()
    neuron = alive = torch.arange(len(covariance))  # neuron of each column; columns still in use
    costs = torch.zeros(len(covariance), dtype=torch.float64)
    highest = costs.new_zeros(1)
    while len(alive):
        cost = (readout.square().sum(dim=0) / inverse.diagonal())[alive]
        order = cost.argsort()
        count = max(1, len(alive) // block)
        going, staying = alive[order[:count]], alive[order[count:]].sort().values
        running = torch.cat([highest, cost[order[:count]]]).cummax(dim=0).values
        costs[neuron[going]], highest = running[1:], running[-1:]
        # take them out of the inverse, and refit the readout of the others, in place; what is left
        # in the columns of those that are gone means nothing
        across = inverse[going]
        gain = torch.linalg.solve(across[:, going], across)
        readout.addmm_(readout[:, going], gain, alpha=-1)
        inverse.addmm_(across.T, gain, alpha=-1)
        alive = staying
        if len(alive) < SQUEEZE * len(neuron):
            inverse, readout, neuron = inverse[alive][:, alive], readout[:, alive], neuron[alive]
            alive = torch.arange(len(alive))
    return costs


def _inverse(covariance: torch.Tensor, ridge: float) -> torch.Tensor:
    """(C + r I)^-1; neurons that never vary keep a finite inverse and cost nothing."""
    # the least float32, so that its inverse is still finite in float64
    scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
    ridged = covariance + ridge * scale * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.cholesky_inverse(torch.linalg.cholesky(ridged))


def _matrix(linear: torch.nn.Linear) -> torch.Tensor:
    return linear.weight.detach().double().cpu()
