"""Units that are often active together, in parts: cuts of the graph of co-activations.

Vertices are units, the weight of an edge is how often both are active for the same token. METIS
cuts it where it is installed (``pip install moee-analysis[graph]``), else spectral clustering.
"""

from __future__ import annotations

import importlib.util

import numpy as np

PARTS = 32  # of a graph, as in the released code
SMALLEST = 8  # units of a part, on average, where there are few
WEIGHTS = 1000  # of the heaviest edge, as a whole number


def parts_of(together: np.ndarray, *, seed: int = 0) -> list[np.ndarray]:
    """Cut the graph whose edges weigh ``together`` (units, units) into parts, as lists of ids."""
    count = min(PARTS, max(1, len(together) // SMALLEST))
    if count == 1:
        return [np.arange(len(together))]
    edges = together.astype(np.float64)
    np.fill_diagonal(edges, 0)
    edges /= max(edges.max(), 1.0)
    metis = importlib.util.find_spec("pymetis") is not None
    labels = (_by_metis if metis else by_spectra)(edges, count, seed=seed)
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def by_spectra(edges: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Label of every vertex, by the eigenvectors of the graph's Laplacian."""
    from sklearn.cluster import SpectralClustering

    connected = edges + 1e-6  # units that are never active hang on to the others
    clustering = SpectralClustering(
        count, affinity="precomputed", assign_labels="cluster_qr", random_state=seed
    )
    return clustering.fit_predict(connected)


def _by_metis(edges: np.ndarray, count: int, *, seed: int) -> np.ndarray:
    import pymetis

    weights = np.rint(WEIGHTS * edges).astype(int)
    linked = weights > 0
    starts = np.concatenate([[0], np.cumsum(linked.sum(axis=1))])
    _, labels = pymetis.part_graph(
        count,
        xadj=starts.tolist(),
        adjncy=np.nonzero(linked)[1].tolist(),
        eweights=weights[linked].tolist(),
        options=pymetis.Options(seed=seed),
    )
    return np.asarray(labels)


def drawn_parts(
    parts: list[np.ndarray], together: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
    """Draw parts without replacement until there are ``size`` units, and leave out what is over.

    Parts are likelier the more often their units are active together. Returns ascending ids.
    """
    inner = [together[np.ix_(part, part)] for part in parts]
    weights = np.array([each.sum() - np.trace(each) for each in inner])
    return np.sort(np.concatenate([parts[i] for i in drawn_order(weights, rng)])[:size])


def drawn_order(weights: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """All ids, drawn one by one without replacement, each as likely as its share of the weights.

    The largest of log-weights plus Gumbel noise come in that very order. What weighs nothing comes
    last.
    """
    noise = rng.gumbel(size=len(weights))
    nothing = np.full(len(weights), -np.inf)
    keys = np.log(weights, out=nothing, where=weights > 0) + noise
    return np.argsort(-keys, kind="stable")
