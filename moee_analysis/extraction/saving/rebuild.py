"""Networks rebuilt from the description in a file, or around the dense network that is given.

A model of timm's is rebuilt by its name and the arguments of ``timm.create_model``, if its answers
tell that this gives the same network; one that was changed by hand, only around the dense network.
"""

import copy
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from timm.layers import create_act
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.saving import checks
from moee_analysis.extraction.saving.checks import INPUT_FACTS, select_below
from moee_analysis.models.attention import LowRankAttention, Ranks, reduced_attentions, site_of
from moee_analysis.models.capture import watch
from moee_analysis.models.fingerprints import alike, answers
from moee_analysis.models.inputs import input_size
from moee_analysis.models.loading import architecture, build_model
from moee_analysis.models.merge_costs import WardCosts
from moee_analysis.models.merging import merging_blocks, set_merging
from moee_analysis.models.unwrapping import stated_modules, unwrapped
from moee_analysis.models.weights import Tensors
from moee_analysis.moe.layer import MoeMlp, Readout, all_mlps, moe_names, replace_module
from moee_analysis.moe.routers import TokenKindRouter, describe_router, rebuild_router

LARGEST_IMAGE = 2**25  # numbers
PARTS = 1000  # parameters of a network, beside twice those of its file


def describe(model: nn.Module) -> dict[str, Any]:
    """Everything :func:`rebuild` needs before the tensors are loaded, as plain JSON values.

    ``by_hand`` says why the name and arguments alone do not rebuild the model; None where they do.

    Raises MoeeError: a router that cannot be saved, or for other tokens; weights not finite.
    """
    tensors = collect_tensors(model)
    checks.check_finite(tensors)
    _check_size(model)
    routed = {name: model.get_submodule(name) for name in moe_names(model).values()}
    reduced = reduced_attentions(model).items()
    facts = {
        "architecture": architecture(model),
        "arguments": find_arguments(model),
        "dtype": name_dtype(model),
        "pretrained_cfg": describe_inputs(model),
        "routers": {name: describe_router(layer.router) for name, layer in routed.items()},
        "attentions": {n: asdict(m.ranks) | {"bias": m.bias is not None} for n, m in reduced},
        "merging": _describe_merging(model),
        "answers": _answers(model),
    }
    try:
        network = _skeleton(facts)
        checks.check_tables(facts, tensors, network)
        _fill(network, facts, tensors, hint="")
    except MoeeError as error:
        name = facts["architecture"]
        return facts | {"by_hand": f"timm.create_model('{name}') makes another one: {error.found}"}
    return facts | {"by_hand": None}


def rebuild(
    described: Mapping[str, Any], tensors: Tensors, *, dense: nn.Module | None
) -> nn.Module:
    """Build the described network with its ``tensors``, ready for evaluation.

    It is built around the ``dense`` network that it was made from; None: by its name.

    Raises MoeeError: a network changed by hand without ``dense``; tensors that do not fit or
    make no sense; one that gives other answers than the network that was described.
    """
    reason = described.get("by_hand")
    if reason and dense is None:
        expected = "the dense network this run was made from, which no name rebuilds"
        hint = "give it, with its weights: moee.load(folder, dense=model)"
        raise MoeeError(expected, f"none ({reason})", hint)
    outline = _outline(described, parts=len(tensors)) if dense is None else unwrapped(dense)
    _check_size(outline)
    checks.check_tables(described, tensors, outline)
    model = _skeleton(described) if dense is None else copy.deepcopy(outline)
    names = described["pretrained_cfg"].get("label_names")
    if dense is not None and names:  # classes may have been named since
        model.pretrained_cfg = {**model.pretrained_cfg, "label_names": tuple(names)}
    hint = "load it with the versions it was made with (run.json, versions), or extract again"
    if dense is not None:
        hint = "give the dense network that the run was made from"
    _fill(model, described, tensors, hint=hint)
    return model


def _fill(model: nn.Module, described: Mapping[str, Any], tensors: Tensors, *, hint: str) -> None:
    """Make the dense ``model`` the described one, and see that it answers as that did."""
    _put_layers(model, described, tensors)
    checks.check_fit(model.state_dict(), tensors, model)
    model.load_state_dict(tensors)
    found = _answers(model.eval())
    if not alike(described.get("answers", found), found):
        wrong = "one that gives other outputs for the same images"
        raise MoeeError("the network that was saved", wrong, hint)


def find_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments with which ``timm.create_model`` builds a model like this one, as far as known.

    They are those it was made with, if timm kept them, and :func:`_visible_arguments`.
    """
    kept = getattr(model, "_model_args", {}).items()
    given = {k: plain for k, v in kept if (plain := _plain(v)) is not None}
    try:
        usual = _usual_arguments(architecture(model), json.dumps(given))
    except MoeeError:  # a name or an argument that timm does not know
        return given
    visible = _visible_arguments(model).items()
    return given | {k: v for k, v in visible if v != usual[k] and v is not None}


@lru_cache(maxsize=16)
def _usual_arguments(name: str, given: str) -> dict[str, Any]:
    """Arguments that a network of timm's shows that is made with those ``given``, in JSON."""
    return _visible_arguments(build_model(name, **json.loads(given)))


def collect_tensors(model: nn.Module) -> Tensors:
    """All tensors of ``model``, those with several names once for each, as files want them."""
    tensors, seen = {}, set()
    for name, stored in model.state_dict().items():
        tensor = stored.detach().cpu().contiguous()
        tensors[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return tensors


def name_dtype(model: nn.Module) -> str:
    """Precision of a model's weights: "float32", "bfloat16", ..."""
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def describe_inputs(model: nn.Module) -> dict[str, Any]:
    """How images come in and which classes go out, as ``pretrained_cfg`` says it, in plain JSON."""
    cfg = {k: v for k, v in model.pretrained_cfg.items() if k in INPUT_FACTS}
    return json.loads(json.dumps(cfg))


def _describe_merging(model: nn.Module) -> dict[str, Any] | None:
    """Which tokens merge; None: none. Refuses costs of other kinds than those of extractions."""
    if (blocks := merging_blocks(model)) is None:
        return None
    kinds = {type(block.costs) for block in blocks}
    if kinds != {WardCosts}:
        found = ", ".join(sorted(kind.__name__ for kind in kinds))
        hint = "save the run itself, not a control made from it"
        raise MoeeError("merging that can be saved (WardCosts)", found, hint)
    return {"merges": list(blocks.schedule), "by_importance": blocks[0].costs.by_importance}


def _put_layers(model: nn.Module, described: Mapping[str, Any], tensors: Tensors) -> None:
    """Make a dense network's tokens merge, and put in routed layers and smaller attentions."""
    if merging := described.get("merging"):
        by_importance = merging["by_importance"]
        merges = merging["merges"]
        set_merging(model, merges, lambda _: WardCosts(by_importance=by_importance))
    for name, router in described["routers"].items():
        mlp, saved = model.get_submodule(name), select_below(name, tensors)
        experts = [saved["kept"][ids] for ids in saved["neurons"].split(saved["sizes"].tolist())]
        built = rebuild_router(router, select_below("router", saved))
        readout = Readout(shift=saved.get("shift"))
        layer = MoeMlp(mlp, built, experts, saved["shares"].numpy(), readout)
        replace_module(model, name, layer.to(mlp.fc1.weight))
    for name, shape in described["attentions"].items():
        dense = model.get_submodule(name)
        ranks = Ranks(shape["scores"], shape["values"], shape["queries"])
        attention = LowRankAttention(site_of(name, dense), ranks, bias=shape["bias"])
        replace_module(model, name, attention.to(dense.proj.weight))
    model.requires_grad_(requires_grad=False)


def _outline(described: Mapping[str, Any], *, parts: int) -> nn.Module:
    """The dense network without values, which takes no memory, from a file of so many ``parts``."""
    counted, most = itertools.count(1), 2 * parts + PARTS

    def count(*_: Any) -> None:
        if next(counted) > most:
            raise ValueError(f"more than {most} parameters")

    with torch.device("meta"), register_module_parameter_registration_hook(count):
        return _skeleton(described)


def _check_size(model: nn.Module) -> None:
    size = input_size(model)
    if math.prod(size) > LARGEST_IMAGE:
        found = " x ".join(map(str, size))
        raise MoeeError(f"images of {LARGEST_IMAGE} numbers at most", found, "take smaller ones")


def _skeleton(described: Mapping[str, Any]) -> nn.Module:
    """The dense network by its name; in format 5 the classes are all that is known of arguments."""
    arguments = described.get("arguments", {"num_classes": described.get("num_classes")})
    arguments = {k: v for k, v in arguments.items() if k not in ("device", "dtype")}
    cfg = described["pretrained_cfg"]
    model = build_model(described["architecture"], pretrained_cfg=cfg, **arguments)
    return model.to(getattr(torch, described.get("dtype", "float32")))


def _plain(value: Any) -> Any:
    """An argument as JSON; activations by name, and None for what has no such form."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        names = (n for n, kind in create_act._ACT_LAYER_DEFAULT.items() if kind is value)
        return next(names, None)
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError):
        return None


def _visible_arguments(model: nn.Module) -> dict[str, Any]:
    """Arguments that a model itself shows: outputs are those of the classifier, if it is plain."""
    heads = stated_modules(model, "classifier").values()
    plain = [head for head in heads if isinstance(head, nn.Linear | nn.Identity)]
    channels, *size = input_size(model)
    pool = getattr(model, "global_pool", None)
    acts = {type(mlp.act) for mlp in all_mlps(model).values()}
    return {
        "num_classes": getattr(plain[0], "out_features", 0) if plain else model.num_classes,
        "global_pool": pool if isinstance(pool, str) else None,
        "in_chans": channels,
        "img_size": size,
        "act_layer": _plain(acts.pop()) if len(acts) == 1 else None,
    }


def _answers(model: nn.Module) -> list[float]:
    """Answers to the probe, of a model whose routers get as many tokens as they say."""
    tokens = {n: m.tokens for n, m in model.named_modules() if isinstance(m, TokenKindRouter)}

    def check(name: str, x: torch.Tensor) -> None:
        if x.ndim == 3 and x.shape[1] != tokens[name]:
            hint = "extract for images of this size"
            raise MoeeError(f"routers of {x.shape[1]} tokens", f"one of {tokens[name]}", hint)

    with watch({name: model.get_submodule(name) for name in tokens}, check):
        return list(answers(model))
