"""No configuration takes a number that makes no sense."""

import dataclasses
import math
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest

from moee_analysis import measure
from moee_analysis.baselines.jetpack import JetpackConfig
from moee_analysis.baselines.moefication import MoeficationConfig
from moee_analysis.baselines.soft_moe import SoftMoeConfig
from moee_analysis.baselines.sparse_upcycling import SparseUpcyclingConfig
from moee_analysis.baselines.static_pruning import StaticPruningConfig
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ClusterConfig, ExtractConfig
from moee_analysis.extraction.record.token_source import Limits
from moee_analysis.measure.evaluation.comparison import Contest
from moee_analysis.training.config import FinetuneConfig, SupervisedConfig
from moee_analysis.utils import checks
from tests.helpers.images import toy_images
from tests.helpers.models import toy_moe, toy_vit

CONFIGS = (
    ExtractConfig, ClusterConfig, FinetuneConfig, SupervisedConfig, StaticPruningConfig,
    MoeficationConfig, SparseUpcyclingConfig, SoftMoeConfig, JetpackConfig, Limits,
)  # fmt: skip
SENSELESS = (math.nan, math.inf, -math.inf, -1, -0.5, 10**30, 1e300, True, "1", "", [], (), 1j)


def numbers_of(config):
    """The fields of a configuration that are numbers, and the types of each."""
    kinds = {f: get_args(f.type) or (f.type,) for f in dataclasses.fields(config)}
    return {field: types for field, types in kinds.items() if {int, float} & set(types)}


@pytest.mark.parametrize("config", CONFIGS)
def test_no_field_takes_a_number_without_sense(config):
    for field, types in numbers_of(config).items():
        values = [*SENSELESS, *([] if type(None) in types else [None])]
        values += [1.5, 1.0, np.float64(2)] if int in types else []
        for value in [*values, 2**32] if field.name == "seed" else values:
            with pytest.raises(MoeeError, match=rf"expected {field.name} as a .*; found "):
                config(**{field.name: value})
    if "layers" in config.__dataclass_fields__:
        for layers in (3, "0", (0.5,), (-1,), (True,), ("0",), (math.nan,), np.arange(2)):
            with pytest.raises(MoeeError, match="expected layers as a"):
                config(layers=layers)
        assert config(layers=(0, 2)).layers == (0, 2)


@pytest.mark.parametrize("wrong", [{"resamples": 0}, {"resamples": 1.5}, {"preset": "huge"}])
def test_a_contest_is_refused_before_its_images_are_compared(wrong):
    with pytest.raises(MoeeError):
        Contest(None, None, None, **wrong)


def test_numbers_of_numpy_are_numbers():
    checks.whole_number("n", np.int64(3))
    checks.real_number("x", np.float32(0.5), above=0, most=1)
    checks.share("x", np.float64(0.5))
    checks.seed_number(np.uint32(2**32 - 1))
    assert FinetuneConfig(epochs=np.int32(2), learning_rate=1).epochs == 2


def test_bounds_are_told_and_kept():
    with pytest.raises(MoeeError, match=r"x as a number above 0 and at most 2; found 0\. "):
        checks.real_number("x", 0, above=0, most=2)
    with pytest.raises(MoeeError, match=r"x as a number at least 0 and below 1; found 1\. "):
        checks.real_number("x", 1, least=0, below=1)
    with pytest.raises(MoeeError, match=r"x as a share in \(0, 1\); found 1\. "):
        checks.share("x", 1, whole=False)
    with pytest.raises(MoeeError, match=r"expected a whole number from 2 to 3; found 4\. "):
        checks.whole_number("", 4, least=2, most=3)
    checks.real_number("x", 2, above=0, most=2)
    checks.real_number("x", Fraction(0), least=0, below=1)
    checks.share("x", 1)
    checks.whole_number("n", 3, least=2, most=3)


def test_a_name_is_one_of_those_there_are():
    checks.one_of("router", "a", {"a": 1, "b": 2})
    for wrong in ("c", "", None, [], 1):
        with pytest.raises(MoeeError, match="router among a, b; found"):
            checks.one_of("router", wrong, {"a": 1, "b": 2})


COUNTS = [
    ("accuracy", 2, "resamples"), ("balance", 1, "resamples"), ("modularity", 2, "permutations"),
    ("modularity", 2, "resamples"), ("class_relatedness", 2, "permutations"),
    ("use_and_need", 1, "permutations"), ("top_patches", 2, "count"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "given", "wrong"), COUNTS)
def test_a_measure_refuses_counts_before_it_looks_at_anything(name, given, wrong):
    for value in (0, -1, 1.5, math.nan, None):
        with pytest.raises(MoeeError, match=f"{wrong} as a whole number"):
            getattr(measure, name)(*[None] * given, **{wrong: value})


SEEDED = {
    "accuracy": 2, "architectures": 2, "balance": 1, "class_distance": 1, "class_information": 1,
    "class_relatedness": 2, "knock_out": 3, "modularity": 2,
    "parts_unseen": 3, "specificity": 1, "use_and_need": 1,
}  # fmt: skip
STORED = {"router_choices": 2, "variants": 4, "embedding": 2, "surrogate": 2}


@pytest.mark.parametrize(("name", "given"), [*SEEDED.items(), *STORED.items()])
def test_a_measure_refuses_a_seed_before_it_looks_at_anything(name, given):
    others = {"store": "store"} if name in STORED else {}
    others |= {"layers": ()} if name in ("embedding", "surrogate") else {}
    for value in (-1, math.nan, "3", 1.5, 10**30, None):
        with pytest.raises(MoeeError, match="seed as a whole number"):
            getattr(measure, name)(*[{"any": None}] * given, seed=value, **others)


def test_measures_refuse_batches_and_layers_of_no_numbers():
    model, images = toy_vit(depth=2), toy_images(4)
    for name in ("accuracy", "latency"):
        for size in (-1, math.nan, "3", 1.5):
            with pytest.raises(MoeeError, match="batch_size as a whole number"):
                getattr(measure, name)({"dense": model}, images, reference=model, batch_size=size)
    for name in ("neurons", "overlap", "sizes"):
        for layers in (5, "0", (0.5,), ([],)):
            with pytest.raises(MoeeError, match="layers as a"):
                getattr(measure, name)(toy_moe(toy_vit(depth=2)), layers=layers)
