"""Layers whose tokens are made up: groups that are known, and a source that holds them."""

from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from timm.layers import Mlp
from torch import nn

from moee_analysis.extraction.cluster.clustering import NOISE
from moee_analysis.extraction.cluster.clusters_to_router import Assignment, Partition
from moee_analysis.extraction.cluster.sample_tokens import SampleAccumulator
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.extraction.record.tokens import LayerSample, RecordedLayer
from moee_analysis.models.loading import MlpSite

DIM, HIDDEN = 4, 6
SITE = MlpSite("mlp", 0, DIM, HIDDEN)
NORTH, EAST, UP = np.eye(DIM)[:3]


def layer_of(sample, *, site=None, seed=0):
    """A layer of a sample, with an MLP of random weights."""
    if site is None:
        site = MlpSite("mlp", 0, sample.inputs.shape[1], sample.hidden.shape[1])
    torch.manual_seed(seed)
    mlp = Mlp(site.dim, site.hidden).requires_grad_(requires_grad=False)
    return RecordedLayer(site, mlp, sample)


def planted(*groups, spread=0.05, seed=0, images=1):
    """A layer with tokens around directions: (direction, count, neuron that varies there).

    The tokens are dealt to so many images, each group as a whole after the last.
    """
    rng = np.random.default_rng(seed)
    inputs, hidden = [], []
    for direction, count, neuron in groups:
        inputs.append(direction + spread * rng.normal(size=(count, DIM)))
        quiet = 0.01 * rng.normal(size=(count, HIDDEN))
        quiet[:, neuron] = rng.normal(size=count)
        hidden.append(quiet)
    total = sum(count for _, count, _ in groups)
    position, image = np.divmod(np.arange(total, dtype=np.int32), images)
    one_image_after_the_other = np.argsort(image, kind="stable")
    values = (
        np.concatenate(inputs).astype(np.float16),
        np.concatenate(hidden).astype(np.float16),
        image,
        position,
        np.ones(total, dtype=np.float32),
    )
    sample = LayerSample(*(each[one_image_after_the_other] for each in values))
    return layer_of(sample, site=SITE, seed=seed)


# 40 tokens to the north that vary in neuron 0, 20 to the east in neuron 1; and 30 tokens of noise
# near the north whose activations vary in neuron 2.
PLANTED = planted((NORTH, 40, 0), (EAST, 20, 1), (NORTH + 0.2 * UP, 30, 2))
LABELS = np.repeat([0, 1, NOISE], [40, 20, 30])
ROWS = np.arange(90)


def part_of(layer, *rows):
    """Some consecutive rows of a layer, from one to another."""
    return replace(layer, sample=layer.sample.part(slice(*rows)))


def parts_of(layer, cuts):
    """All of a layer, divided at the rows ``cuts``."""
    edges = [0, *cuts, len(layer.sample)]
    return [part_of(layer, *pair) for pair in pairwise(edges)]


def added_up(accumulator, layers):
    """Sums of an accumulator over the parts of a layer, one after the other."""
    shapes = accumulator.shapes.items()
    sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes}
    for layer in layers:
        accumulator.update(sums, layer)
    return sums


def sums_of(accumulator, layer):
    """Sums of an accumulator over one layer, all in one part."""
    return added_up(accumulator, [layer])


def computed(accumulator, layer):
    """What an accumulator computes of one layer."""
    return accumulator.compute(sums_of(accumulator, layer))


def agree(one, other, *, rtol=1e-6):
    """Require two sums to be the same but for rounding."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        atol = rtol * float(other[name].abs().max())
        np.testing.assert_allclose(values, other[name], rtol=rtol, atol=atol, err_msg=name)


def draw_from(layer, rows=None, *, leading=0):
    """Draw the tokens with the numbers ``rows``, None: all but the leading ones."""
    if rows is None:
        rows = np.flatnonzero(layer.sample.position >= leading) + layer.sample.start
    graded = layer.sample.norms is not None
    accumulator = SampleAccumulator(layer.site, rows, leading, hidden=True, gradients=graded)
    return replace(computed(accumulator, layer), mlp=layer.mlp, key="planted")


def assigned(members, *, dim=DIM, prefix=(), experts=None):
    """An assignment of the tokens in a row to ``members``, experts of a partition or -1.

    The router sends them wherever their inputs point.
    """
    experts = int(np.max(members)) + 1 if experts is None else experts
    centres = np.random.default_rng(0).normal(size=(experts, dim)).astype(np.float32)
    rows = np.arange(len(members))
    return Assignment(prefix, Partition(centres=centres, rows=rows, labels=np.asarray(members)))


@dataclass
class Made:
    """A source of made-up layers, whose tokens come in parts divided at the rows ``cuts``."""

    layers: list[RecordedLayer]
    root: Path
    cuts: tuple[int, ...] = ()
    limits: Limits = field(default_factory=Limits)
    key: str = "made"
    reads: list[list[str]] = field(default_factory=list)
    numbers: tuple[int, ...] | None = None
    kinds: tuple[str, ...] = ()

    @property
    def sites(self):
        return [layer.site for layer in self.layers]

    @property
    def model(self):
        return nn.ModuleDict({layer.site.name: layer.mlp for layer in self.layers})

    @property
    def images(self):
        return range(int(self.layers[0].sample.image.max()) + 1)

    @property
    def whole(self):
        """How many tokens of an image each layer has, in all and in the sample."""
        count, samples = len(self.images), {each.site.name: each.sample for each in self.layers}
        return SimpleNamespace(
            tokens={name: round(each.weight.sum() / count) for name, each in samples.items()},
            kept={name: len(each) // count for name, each in samples.items()},
        )

    @property
    def leading(self):
        return {each.site.name: self.kinds for each in self.layers}

    @property
    def own(self):
        return [range(number, number + 1) for number in range(len(self.cuts) + 1)]

    @property
    def chosen(self):
        return self.own

    def parts(self, sites, *, gradients=False, skip=0):
        names = [site.name for site in sites]
        self.reads.append(names)
        divided = {e.site.name: parts_of(e, self.cuts) for e in self.layers if e.site.name in names}
        for number in range(skip, len(self.own)):
            yield {name: parts[number] for name, parts in divided.items()}


def sample_of(hidden=None, *, inputs=None, weight=None, gradients=None, position=None, image=None):
    """A layer's sample of given values, one image; what is not given is zeros, the weights ones."""
    rows = len(next(v for v in (hidden, inputs, weight, position) if v is not None))
    gradients = None if gradients is None else gradients.swapaxes(0, 1)  # rows first
    norms = None if gradients is None else np.ones(gradients.shape[:2], np.float32)
    return LayerSample(
        np.zeros((rows, 4), np.float16) if inputs is None else inputs,
        hidden,
        np.zeros(rows, np.int32) if image is None else image,
        np.zeros(rows, np.int32) if position is None else position,
        np.ones(rows, np.float32) if weight is None else weight,
        gradients,
        norms,
    )


def random_layer(*, rows=60, dim=5, hidden=7, weights=(1, 2, 3)):
    """A layer of dependent neurons, two gradients, and 6 tokens of every image, some of them kept.

    A token stands for as many as one of the ``weights``.
    """
    rng = np.random.default_rng(0)
    image, position = np.divmod(np.arange(rows, dtype=np.int32), 6)
    mixing = rng.normal(size=(hidden, hidden))
    sample = sample_of(
        (rng.normal(1, 1, size=(rows, hidden)) @ mixing).astype(np.float16),
        inputs=rng.normal(size=(rows, dim)).astype(np.float16),
        gradients=rng.normal(size=(2, rows, dim)).astype(np.float16),
        weight=rng.choice(weights, size=rows).astype(np.float32),
        image=image,
        position=position,
    )
    sample.norms[:] = rng.gamma(1.0, size=(rows, 2))
    return layer_of(sample)


def repeated(sample, own):
    """Hidden activations of the tokens ``own``, each as often as its weight says."""
    return np.repeat(sample.hidden[own].astype(float), sample.weight[own].astype(int), axis=0)


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether labels differ by their numbers alone, and noise, -1, not at all."""
    pairs = set(zip(one.tolist(), other.tolist(), strict=True))
    same_noise = all((a == -1) == (b == -1) for a, b in pairs)
    return same_noise and len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})
