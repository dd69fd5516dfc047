"""Chance and uncertainty by permuting or redrawing whole images.

The tokens of one image depend on each other: to shuffle tokens makes a null distribution that is
twenty to forty times too narrow.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import entr

from moee_analysis.utils.checks import whole_number

MIDDLE = (0.025, 0.975)  # quantiles that end the middle 95 %


class Groups:
    """Images sorted by their ``labels``, (images,).

    ``order``, int64 (images,), are their indices, class after class; ``classes``, ``starts`` and
    ``sizes``, int64 (classes,), class indices, where each starts in ``order``, and its images.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.order = np.argsort(labels, kind="stable")
        facts = np.unique(labels[self.order], return_index=True, return_counts=True)
        self.classes, self.starts, self.sizes = facts

    def means(self, values: np.ndarray, order: np.ndarray) -> np.ndarray:
        """Mean of ``values`` (images, columns) over each class: (classes, columns).

        ``order`` is that of the images, or puts others in their places: shuffled, or resampled.
        """
        # images of a class stand together, so one pass sums all classes
        return np.add.reduceat(values[order], self.starts, axis=0) / self.sizes[:, None]

    def shuffle(self, rng: np.random.Generator) -> np.ndarray:
        """An order in which images have lost their class: the null hypothesis."""
        return rng.permutation(self.order)

    def resample(self, rng: np.random.Generator) -> np.ndarray:
        """An order that redraws the images of each class with replacement, all classes at once."""
        picks = np.floor(rng.random(len(self.order)) * np.repeat(self.sizes, self.sizes))
        return self.order[np.repeat(self.starts, self.sizes) + picks.astype(np.int64)]

    def exchange(self, rng: np.random.Generator) -> np.ndarray:
        """For every image, another image of its class; every image is used once."""
        # sorted by class, then by chance: each class is permuted within itself
        keys = np.repeat(np.arange(len(self.sizes)), self.sizes) + rng.random(len(self.order))
        partners = np.empty_like(self.order)
        partners[self.order] = self.order[np.argsort(keys)]
        return partners


def repeat(
    draw: Callable[[np.random.Generator], np.ndarray], *, times: int, seed: int
) -> np.ndarray:
    """Values of ``draw(generator)``, (times, ...); ``times`` is at least 1."""
    whole_number("the number of permutations or resamples", times)
    rng = np.random.default_rng(seed)
    return np.stack([draw(rng) for _ in range(times)])


def redraw_counts(count: int, times: int, *, seed: int) -> np.ndarray:
    """How often each of ``count`` images is in every resample, int64 (times, count)."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), times)


def over_seeds(right: np.ndarray, own: np.ndarray, *, resamples: int) -> dict[str, float]:
    """Retention over several seeds, and its 95 % interval by a bootstrap of images and of seeds.

    ``right`` is what every seed gets right, bool (seeds, images), ``own`` what the dense model
    gets right, bool (images,). ``mean``, ``low`` and ``high`` are shares of the dense top-1.
    """
    every, dense = right.astype(float), own.astype(float)

    def resample(rng: np.random.Generator) -> np.ndarray:
        seeds, images = (rng.integers(size, size=size) for size in every.shape)
        return every[seeds][:, images].mean() / max(dense[images].mean(), 1e-12)

    low, high = np.quantile(repeat(resample, times=resamples, seed=0), MIDDLE)
    mean = every.mean() / max(dense.mean(), 1e-12)
    return {"mean": float(mean), "low": float(low), "high": float(high)}


def basic_interval(
    value: ArrayLike, resampled: np.ndarray, *, least: ArrayLike = 0.0, most: ArrayLike = np.inf
) -> tuple[np.ndarray, np.ndarray]:
    """95 % basic bootstrap interval ``2 v - q``, within ``least`` and ``most``.

    Divergences of resampled images lie above the estimate as that lies above the truth: this takes
    the bias off, and may end below the value itself.
    """
    lower, upper = np.quantile(resampled, MIDDLE, axis=0)
    return np.clip(2 * value - upper, least, most), np.clip(2 * value - lower, least, most)


def against_chance(value: np.ndarray, null: np.ndarray) -> dict[str, np.ndarray]:
    """Compare ``value`` (...) with its ``null`` distribution (permutations, ...).

    ``null_mean``, ``null_high`` (95 %), ``p`` (one-sided, never 0), ``excess`` (value less mean).
    """
    mean, above = null.mean(axis=0), (null >= value - 1e-12).sum(axis=0)
    found = {"null_mean": mean, "null_high": np.quantile(null, 0.95, axis=0)}
    return found | {"p": (1 + above) / (1 + len(null)), "excess": value - mean}


def entropy(p: np.ndarray) -> np.ndarray:
    """Shannon entropy of distributions ``p`` (..., experts), in bits."""
    return entr(p).sum(axis=-1) / np.log(2)


def jensen_shannon(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of ``p`` and ``q`` (..., experts), in bits: 0 equal, 1 disjoint."""
    # rounding may leave less than nothing
    return np.maximum(entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2, 0)
