"""Runs whose checksums fit and whose content makes no sense, made on purpose."""

import copy
import random
import shutil
from dataclasses import replace
from functools import reduce
from operator import getitem

import pytest
import torch

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import FACTS, load
from tests.helpers.models import (
    lively,
    pixels_of,
    reduced_attention,
    same_models,
    toy_kinds,
    toy_moe,
)
from tests.helpers.runs import parts_of, run_of, write_parts

KINDS, COSINE = "blocks.0.mlp", "blocks.2.mlp"  # routed; the one between them is dense
ATTENTION = "blocks.2.attn"
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TUNING = {
    "key": "a1", "config": {"epochs": 1, "learning_rate": 1e-5, "batch_size": 8, "ema": None},
    "images": "noise", "n_images": 9, "n_held_out": 1, "images_sha256": "b2", "contents": ["c3"],
    "best": 1, "stopped": "",
    "history": [
        {"epoch": 0, "steps": 0, "loss": None, "kl": 0.5, "agreement": 0.5},
        {"epoch": 1, "steps": 2, "loss": 0.3, "kl": 0.4, "agreement": 1.0},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def whole():
    """A run with all that one can have: kinds of tokens, experts' own W2, smaller heads, tuned."""
    model = lively("vit_tiny_patch16_224", num_classes=6, **SIZES)
    toy_moe(toy_kinds(model, layers=(0,)), layers=(1,))  # the second of those still dense
    run = run_of(reduced_attention(model, ranks=(5, 8)).eval())
    return replace(run, provenance=run.provenance | {"finetunings": [TUNING]})


@pytest.fixture(scope="module")
def saved(whole, tmp_path_factory):
    folder = tmp_path_factory.mktemp("forged") / "run"
    whole.save(folder)
    return folder


@pytest.fixture(scope="module")
def parts(saved):
    return parts_of(saved)


def forged(folder, parts, change):
    facts, tensors = copy.deepcopy(parts)
    change(facts, tensors)
    return write_parts(folder, facts, tensors)


def tensor(name, made):
    return lambda _facts, tensors: tensors.update({name: made(tensors[name])})


def put(name, place, value):
    return lambda _facts, tensors: tensors[name].view(-1)[place].fill_(value)


def at(place, value):
    """Change the facts at a place, a text if no name has a dot; ``KeyError``: take it out."""
    names = place.split(".") if isinstance(place, str) else place
    way = [int(name) if str(name).isdecimal() else name for name in names]

    def change(facts, _tensors):
        for key in way[:-1]:
            facts = facts[key]
        if value is KeyError:
            del facts[way[-1]]
        else:
            facts[way[-1]] = value

    return change


def numbers(*values):
    return torch.tensor(values)


LISTS = ("neurons", "sizes", "kept", "shares")
NEURONS, SIZES_OF, KEPT, SHARES = (f"{KINDS}.{name}" for name in LISTS)
WEIGHTS = ("shift", "fc1.weight", "fc2.bias", "router.inner.directions", "router.inner.offsets")
TENSORS_OF = {
    "a neuron of -1": put(NEURONS, 5, -1),
    "a neuron of a million": put(NEURONS, 5, 10**6),
    "a neuron twice": tensor(NEURONS, lambda t: t.index_fill(0, numbers(5), t[4])),
    "neurons in no order": tensor(NEURONS, lambda t: t.flip(0)),
    "a neuron less": tensor(NEURONS, lambda t: torch.cat([t[:3], t[4:]])),
    "neurons as fractions": tensor(NEURONS, torch.Tensor.float),
    "sizes of another sum": put(SIZES_OF, 1, 10**4),
    "a size that overflows": put(SIZES_OF, 1, 2**62),
    "a negative size": tensor(SIZES_OF, lambda t: t + numbers(-70, 70, 0, 0)),
    "a size of zero": put(SIZES_OF, 0, 0),
    "sizes exchanged": tensor(f"{COSINE}.sizes", lambda t: t.flip(0)),
    "no experts": tensor(f"{COSINE}.sizes", lambda t: t[:0]),
    "one number as sizes": tensor(f"{COSINE}.sizes", lambda t: t.sum()),
    "kept out of range": put(KEPT, -1, 10**6),
    "kept reversed": tensor(KEPT, lambda t: t.flip(0)),
    "kept doubled": put(KEPT, 1, 0),
    "shares of NaN": put(SHARES, 0, torch.nan),
    "shares below zero": tensor(SHARES, lambda t: t + numbers(-1, 1, 0, 0)),
    "shares of another sum": tensor(SHARES, lambda t: 2 * t),
    "shares as whole numbers": tensor(SHARES, torch.Tensor.long),
    "shares of other experts": tensor(f"{COSINE}.shares", lambda t: t.flip(0)),
    "weights in half precision": tensor("norm.weight", torch.Tensor.half),
    "NaN in a weight": put(f"{KINDS}.fc1.weight", 0, torch.nan),
    "infinity in the head": put("head.bias", 0, torch.inf),
    "NaN in a centre": put(f"{COSINE}.router.centres", 0, torch.nan),
    "a centre too many": tensor(f"{COSINE}.router.centres", lambda t: torch.cat([t, t[:1]])),
    "tensors of nothing": lambda _facts, tensors: tensors.update(more=torch.zeros(2)),
    "no tensors": lambda _facts, tensors: tensors.clear(),
}
GONE = [f"{ATTENTION}.kvq.weight", *(f"{KINDS}.{name}" for name in (*LISTS, *WEIGHTS))]
ROUTERS, HEADS = ("model", "routers"), ("model", "attentions")
FACTS_OF = {  # values that cannot be at a place
    # the network
    (*ROUTERS, KINDS): [KeyError], (*ROUTERS, KINDS, "kind"): ["zzz"],
    (*ROUTERS, KINDS, "prefix"): [[7], [-1], [10**9]], (*ROUTERS, KINDS, "tokens"): [18, 0],
    (*ROUTERS, KINDS, "more"): [1], (*ROUTERS, COSINE, "kind"): ["nearest"],
    (*ROUTERS, "blocks.9.mlp"): [{"kind": "cosine"}], (*ROUTERS, "norm"): [{"kind": "cosine"}],
    (*HEADS, ATTENTION): [KeyError], (*HEADS, ATTENTION, "scores"): [6],
    (*HEADS, ATTENTION, "values"): [10**9, -1, 8.0], (*HEADS, "blocks.7.attn"): [{}],
    "model.architecture": ["vit_giant_patch14_224", "zzz", 3], "model.arguments": [[]],
    "model.arguments.pretrained_cfg": [None], "model.arguments.checkpoint_path": ["weights.pth"],
    "model.arguments.depth": [10**9, 10**5], "model.arguments.embed_dim": [10**5 - 1],
    "model.arguments.img_size": [10**9, 10**5, [32, 32, 32]], "model.arguments.in_chans": [-1],
    "model.arguments.zzz": [1, [[[{"depth": 10**9}]]]], "model.dtype": ["nn", "float64"],
    "model.pretrained_cfg.mean": ["grey"], "model.pretrained_cfg.std": [[0, 0, 0]],
    "model.pretrained_cfg.input_size": [[32, 32], [3, 10**9, 10**9]],
    "model.pretrained_cfg.interpolation": ["zzz"], "model.pretrained_cfg.label_names": [[1, 2]],
    "model.pretrained_cfg.architecture": ["vit_tiny_patch16_384"],
    "model.answers": [[], [1e999] * 16, [0.5], ["a"] * 16],
    # the configuration, and what is told of layers
    "config.zzz": [1], "config.recipe": ["zzz", []], "config.seed": ["0", -1],
    "config.clustering": [3], "config.clustering.zzz": [3], "variance_kept": [1.5, "0.8"],
    "layers": [{}], "layers.0.sizes": [[1, 2, 3, 4]], "layers.0.experts": [5],
    "layers.0.hidden": [129], "layers.0.converted": [False], "layers.0.union_fraction": [0.1],
    "layers.0.active_fraction": [0.9], "layers.1.name": ["blocks.0.mlp"],
    "layers.1.experts": [3], "layers.1.noise_share": [2],
    # where it comes from
    "provenance": [[]], "provenance.model": ["vit_tiny_patch16_384"],
    "provenance.arguments.pretrained": [True], "provenance.weights_file": [3],
    "provenance.contents": [[[1]]], "provenance.finetunings": [[]],
    "provenance.finetunings.0.best": [2, -1], "provenance.finetunings.0.history.1.loss": ["low"],
    "provenance.finetunings.0.history": [[], ["a", "b"], TUNING["history"][::-1]],
    "zzz": [1], "format": ["6"],
}  # fmt: skip


FORGED = TENSORS_OF | {f"no {name}": lambda _, tensors, n=name: tensors.pop(n) for name in GONE}
FORGED |= {
    f"{value} at {place}": at(place, value)
    for place, values in FACTS_OF.items()
    for value in values
}
FORGED |= {
    "a report less": lambda facts, _: facts["layers"].pop(),
    "a report twice": lambda facts, _: facts["layers"].append(facts["layers"][-1]),
    "reports in another order": lambda facts, _: facts["layers"].reverse(),
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_run_is_refused(name, parts, tmp_path):
    with pytest.raises(MoeeError) as error:
        load(forged(tmp_path / "run", parts, FORGED[name]))
    assert "\n" not in str(error.value)
    assert "edited since then" not in str(error.value)


def fields(content, way=()):
    """Every place below ``content``."""
    if isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else range(len(content)):
            yield (*way, key)
            yield from fields(content[key], (*way, key))


MAY_BE_MISSING = {"checksum", "contents", "finetunings"}
OPEN = {"arguments", "pretrained_cfg", "versions", "finetunings"}


def test_no_field_may_be_missing(parts, tmp_path):
    for way in fields(parts[0]):
        in_open = OPEN.intersection(way[:-1]) or isinstance(way[-1], int)
        if in_open or way[-1] in MAY_BE_MISSING or way == ("provenance", "dtype"):
            continue
        with pytest.raises(MoeeError):
            load(forged(tmp_path / "run", parts, at(way, KeyError)))


def test_the_same_content_is_loaded(whole, parts, tmp_path):
    note = {"by": ["me", 10**9]}  # more may be told of where a run comes from
    loaded = load(forged(tmp_path / "run", parts, at("provenance.note", note)))
    assert same_models(loaded.model, whole.model)
    assert (loaded.layers, loaded.config) == (whole.layers, whole.config)
    assert loaded.provenance == whole.provenance | {"note": note}


def test_json_in_which_lists_are_deep_in_each_other_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "run")
    text = (folder / FACTS).read_text()
    for depth in (300, *range(880, 1000, 12), 5000):
        deep = f'"reason": {"[" * depth + "]" * depth}'
        (folder / FACTS).write_text(text.replace('"reason": ""', deep))
        with pytest.raises(MoeeError):
            load(folder)


# Whatever is changed


VALUES = [
    None, True, False, "", "zzz", -1, 0, 1, 2.5, 10**9, 10**30, 1e300, float("nan"), float("inf"),
    [], {}, [None], {"a": 1}, "x" * 5000,
]  # fmt: skip
SEEN = ("kept", "neurons", "sizes", "shares", "expert")  # tables


def changed_facts(facts, rng):
    way = rng.choice(list(fields(facts)))
    old, values = reduce(getitem, way, facts), [KeyError, *VALUES]
    if isinstance(old, int | float):
        values += 5 * [-old]
    if isinstance(old, list):
        values += 5 * [old + old[:1]] + 5 * [old[::-1]]
    at(way, rng.choice(values))(facts, None)


def changed_tensors(tensors, rng):
    name = rng.choice(list(tensors))
    table = name.rpartition(".")[2] in SEEN
    old = tensors.pop(name)
    flat = old.reshape(-1)
    place = rng.randrange(max(len(flat), 1))
    others = [
        None, old.double(), old.int(), old.half(), old.bool(), old[None], flat[:-1],
        torch.cat([flat, flat[:1]]), torch.full_like(old.float(), torch.nan).to(old),
        rng.choice(list(tensors.values())),
    ]  # fmt: skip
    if table:
        step = torch.zeros_like(flat)
        step[place] = rng.choice([-1, 1, 2**31])
        others += [-old, old.flip(0) if old.ndim else old + 1, (flat + step).view_as(old), old * 0]
    new = rng.choice(others)
    if new is not None:
        tensors[name] = new.clone()


def test_whatever_is_changed_is_refused_or_only_describes(whole, parts, tmp_path):
    x, rng = pixels_of(whole.model), random.Random(0)
    outputs, loaded = whole.model(x), 0
    for number in range(120):
        change = changed_facts if number % 2 else changed_tensors
        facts, tensors = copy.deepcopy(parts)
        change(facts if number % 2 else tensors, rng)
        try:
            run = load(write_parts(tmp_path / "run", facts, tensors))
        except MoeeError:
            continue
        torch.testing.assert_close(run.model(x), outputs)
        loaded += 1
    assert loaded < 60
