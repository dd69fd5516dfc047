"""Runs whose checksums fit and whose content makes no sense, made on purpose."""

import copy
import json
import random
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import FACTS, TENSORS, load
from moee_analysis.utils.storage.files import checksum, file_hash
from tests.helpers.models import (
    lively,
    pixels_of,
    reduced_attention,
    same_models,
    toy_kinds,
    toy_moe,
)
from tests.helpers.runs import run_of

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
    """What is in the files: facts, and tensors."""
    return json.loads((saved / FACTS).read_text()), load_file(saved / TENSORS)


def write(folder, facts, tensors):
    """Make both checksums anew, as a tool does that knows how."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSORS)
    facts = {key: value for key, value in facts.items() if key != "checksum"}
    if "tensors_sha256" in facts:
        facts["tensors_sha256"] = file_hash(folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    return folder


def forged(folder, parts, change):
    facts, tensors = copy.deepcopy(parts)
    change(facts, tensors)
    return write(folder, facts, tensors)


def at(path, value):
    """Change the facts at a dotted path; of an entry with dots in its name, by a list."""
    *way, last = path.split(".") if isinstance(path, str) else path

    def change(facts, _tensors):
        for key in way:
            facts = facts[int(key) if isinstance(facts, list) else key]
        if value is KeyError:
            del facts[last]
        else:
            facts[last] = value

    return change


def tensor(name, made):
    return lambda _facts, tensors: tensors.update({name: made(tensors[name])})


def put(name, place, value):
    def change(_facts, tensors):
        tensors[name].view(-1)[place] = value

    return change


def gone(name):
    return lambda _facts, tensors: tensors.pop(name)


ROUTER = ("model", "routers", KINDS)
HEADS = ("model", "attentions", ATTENTION)

FORGED = {
    "a neuron of -1": put(f"{KINDS}.neurons", 5, -1),
    "a neuron of a million": put(f"{KINDS}.neurons", 5, 10**6),
    "a neuron twice": tensor(f"{KINDS}.neurons", lambda t: t.index_fill(0, torch.tensor(5), t[4])),
    "neurons in no order": tensor(f"{KINDS}.neurons", lambda t: t.flip(0)),
    "a neuron less": tensor(f"{KINDS}.neurons", lambda t: torch.cat([t[:3], t[4:]])),
    "sizes of another sum": put(f"{KINDS}.sizes", 1, 10**4),
    "a size that overflows": put(f"{KINDS}.sizes", 1, 2**62),
    "a negative size": tensor(f"{KINDS}.sizes", lambda t: t + torch.tensor([-70, 70, 0, 0])),
    "a size of zero": put(f"{KINDS}.sizes", 0, 0),
    "sizes exchanged": tensor(f"{COSINE}.sizes", lambda t: t.flip(0)),
    "no experts": tensor(f"{COSINE}.sizes", lambda t: t[:0]),
    "one number as sizes": tensor(f"{COSINE}.sizes", lambda t: t.sum()),
    "kept out of range": put(f"{KINDS}.kept", -1, 10**6),
    "kept reversed": tensor(f"{KINDS}.kept", lambda t: t.flip(0)),
    "kept doubled": put(f"{KINDS}.kept", 1, 0),
    "shares of NaN": put(f"{KINDS}.shares", 0, torch.nan),
    "shares below zero": tensor(f"{KINDS}.shares", lambda t: t + torch.tensor([-1, 1, 0, 0])),
    "shares of another sum": tensor(f"{KINDS}.shares", lambda t: 2 * t),
    "shares of other experts": tensor(f"{COSINE}.shares", lambda t: t.flip(0)),
    "shares as whole numbers": tensor(f"{KINDS}.shares", torch.Tensor.long),
    "neurons as fractions": tensor(f"{KINDS}.neurons", torch.Tensor.float),
    "weights in half precision": tensor("norm.weight", torch.Tensor.half),
    "NaN in a weight": put(f"{KINDS}.fc1.weight", 0, torch.nan),
    "infinity in the head": put("head.bias", 0, torch.inf),
    "NaN in a centre": put(f"{COSINE}.router.centres", 0, torch.nan),
    "a centre too many": tensor(f"{COSINE}.router.centres", lambda t: torch.cat([t, t[:1]])),
    "tensors of nothing": lambda _facts, tensors: tensors.update(more=torch.zeros(2)),
    "no tensors": lambda _facts, tensors: tensors.clear(),
    **{
        f"no {name}": gone(f"{KINDS}.{name}")
        for name in (
            "kept", "neurons", "sizes", "shares", "shift", "fc1.weight", "fc2.bias",
            "router.inner.directions", "router.inner.offsets",
        )
    },
    "no kvq": gone(f"{ATTENTION}.kvq.weight"),
    # the network
    "an unknown router": at((*ROUTER, "kind"), "zzz"),
    "another router": at((*ROUTER[:2], COSINE, "kind"), "nearest"),
    "a router of no layer": at((*ROUTER[:2], "blocks.9.mlp"), {"kind": "cosine"}),
    "a router of no MLP": at((*ROUTER[:2], "norm"), {"kind": "cosine"}),
    "a layer without router": at(ROUTER, KeyError),
    "leading tokens of no expert": at((*ROUTER, "prefix"), [7]),
    "leading tokens below zero": at((*ROUTER, "prefix"), [-1]),
    "leading tokens of a billion": at((*ROUTER, "prefix"), [10**9]),
    "another number of tokens": at((*ROUTER, "tokens"), 18),
    "no tokens": at((*ROUTER, "tokens"), 0),
    "more of a router": at((*ROUTER, "more"), 1),
    "other ranks": at((*HEADS, "scores"), 6),
    "enormous ranks": at((*HEADS, "values"), 10**9),
    "negative ranks": at((*HEADS, "values"), -1),
    "fractions of ranks": at((*HEADS, "values"), 8.0),
    "an attention of no block": at((*HEADS[:2], "blocks.7.attn"), {}),
    "an attention less": at(HEADS, KeyError),
    "another architecture": at("model.architecture", "vit_giant_patch14_224"),
    "no architecture of timm's": at("model.architecture", "zzz"),
    "a number as architecture": at("model.architecture", 3),
    "another configuration": at("model.arguments.pretrained_cfg", None),
    "a file to be loaded": at("model.arguments.checkpoint_path", "weights.pth"),
    "weights of the hub": at("provenance.arguments.pretrained", value=True),
    "a billion blocks": at("model.arguments.depth", 10**9),
    "many blocks": at("model.arguments.depth", 10**5),
    "an enormous width": at("model.arguments.embed_dim", 10**5 - 1),
    "enormous images": at("model.arguments.img_size", 10**9),
    "very large images": at("model.arguments.img_size", 10**5),
    "images of three sides": at("model.arguments.img_size", [32, 32, 32]),
    "negative channels": at("model.arguments.in_chans", -1),
    "an unknown argument": at("model.arguments.zzz", 1),
    "arguments deep in each other": at("model.arguments.zzz", [[[{"depth": 10**9}]]]),
    "a list of arguments": at("model.arguments", []),
    "a precision that is none": at("model.dtype", "nn"),
    "another precision": at("model.dtype", "float64"),
    "a mean that is none": at("model.pretrained_cfg.mean", "grey"),
    "no deviation": at("model.pretrained_cfg.std", [0, 0, 0]),
    "two sides of an image": at("model.pretrained_cfg.input_size", [32, 32]),
    "enormous sides of an image": at("model.pretrained_cfg.input_size", [3, 10**9, 10**9]),
    "an interpolation that is none": at("model.pretrained_cfg.interpolation", "zzz"),
    "numbers as names of classes": at("model.pretrained_cfg.label_names", [1, 2]),
    "a name of another network": at("model.pretrained_cfg.architecture", "vit_tiny_patch16_384"),
    "no answers": at("model.answers", []),
    "infinite answers": at("model.answers", [1e999] * 16),
    "a few answers": at("model.answers", [0.5]),
    "answers that are text": at("model.answers", ["a"] * 16),
    # the configuration, and what is told of layers
    "an unknown setting": at("config.zzz", 1),
    "a recipe that is none": at("config.recipe", "zzz"),
    "a list as recipe": at("config.recipe", []),
    "text as seed": at("config.seed", "0"),
    "a negative seed": at("config.seed", -1),
    "a number as clustering": at("config.clustering", 3),
    "an unknown setting of clusters": at("config.clustering.zzz", 3),
    "a share above 1": at("variance_kept", 1.5),
    "text as share": at("variance_kept", "0.8"),
    "a report less": lambda facts, _: facts["layers"].pop(),
    "a report twice": lambda facts, _: facts["layers"].append(facts["layers"][-1]),
    "reports in another order": lambda facts, _: facts["layers"].reverse(),
    "a dict of reports": at("layers", {}),
    "a report of other sizes": at("layers.0.sizes", [1, 2, 3, 4]),
    "a report of other experts": at("layers.0.experts", 5),
    "a report of another width": at("layers.0.hidden", 129),
    "a report of a dense layer": lambda facts, _: facts["layers"][0].update(converted=False),
    "a report of another union": at("layers.0.union_fraction", 0.1),
    "a report of other use": at("layers.0.active_fraction", 0.9),
    "a report of another layer": at("layers.1.name", "blocks.0.mlp"),
    "experts in a dense layer": at("layers.1.experts", 3),
    "noise above 1": at("layers.1.noise_share", 2),
    # where it comes from
    "another origin": at("provenance.model", "vit_tiny_patch16_384"),
    "a list as origin": at("provenance", []),
    "weights of a number": at("provenance.weights_file", 3),
    "contents that are lists": at("provenance.contents", [[1]]),
    "an epoch too many": at("provenance.finetunings.0.best", 2),
    "an epoch below zero": at("provenance.finetunings.0.best", -1),
    "no history": at("provenance.finetunings.0.history", []),
    "a history of text": at("provenance.finetunings.0.history", ["a", "b"]),
    "a history in another order": lambda facts, _: (
        facts["provenance"]["finetunings"][0]["history"].reverse()
    ),
    "a loss of text": at("provenance.finetunings.0.history.1.loss", "low"),
    "no fine-tuning": at("provenance.finetunings", []),
    "an unknown field": at("zzz", 1),
    "a format of text": at("format", "6"),
}  # fmt: skip


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
    inner = facts
    for key in way[:-1]:
        inner = inner[key]
    last, old = way[-1], inner[way[-1]]
    match rng.choice(["delete", "replace", "negate", "double", "exchange"]):
        case "delete":
            del inner[last]
        case "negate" if isinstance(old, int | float):
            inner[last] = -old
        case "double" if isinstance(inner, list):
            inner.append(copy.deepcopy(old))
        case "exchange":
            other = (
                rng.choice(list(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
            )
            inner[last], inner[other] = inner[other], old
        case _:
            inner[last] = rng.choice(VALUES)


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
            run = load(write(tmp_path / "run", facts, tensors))
        except MoeeError:
            continue
        torch.testing.assert_close(run.model(x), outputs)
        loaded += 1
    assert loaded < 60
