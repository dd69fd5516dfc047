"""Tokens are not all alike: what the leading ones are, and whose outputs nothing reads."""

import re
from collections.abc import Iterable, Sequence
from itertools import zip_longest

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.extraction.record.recorded_tokens import TokenPlan
from moee_analysis.models.attention import AttentionSite
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import MlpSite, blank, find_mlps, input_size

PREFIX_KINDS = {"cls_token": ("cls", "dist"), "dist_token": ("dist",), "reg_token": ("register",)}
"""Kinds of the tokens in timm's parameters of these names, in order; a distilled PiT has both of
its leading tokens in one parameter."""


def prefix_kinds(model: nn.Module) -> tuple[str, ...]:
    """Return the kind of every leading token: "cls", "dist" or "register", in their order.

    The order is that of timm's ``_pos_embed``: class, then distillation or register tokens, then
    patches. A model may have a class token for each of its branches (CoaT, CrossViT); no layer
    sees more than one of them, and some see none, see :func:`leading_kinds`.
    """
    expected = vars(model).get("num_prefix_tokens")
    if expected == 0:
        return ()
    own = {  # the number of a branch is no part of a parameter's name
        re.sub(r"_token_?\d+$", "_token", name.rpartition(".")[2]): len(parameter[0])
        for name, parameter in model.named_parameters()
        if parameter.ndim > 2
    }
    kinds = []
    for name, known in PREFIX_KINDS.items():
        count = own.get(name, 0)
        kinds += (known + known[-1:] * count)[:count]  # the last kind goes on
    if expected is not None and len(kinds) != expected:
        raise MoeeError(
            f"{expected} leading tokens, as num_prefix_tokens says",
            f"{', '.join(kinds) or 'none'} among the parameters of {type(model).__name__}",
            f"use a model whose leading tokens are timm's {', '.join(PREFIX_KINDS)}",
        )
    return tuple(kinds)


def kinds_seen(model: nn.Module, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the kinds of the leading tokens that a layer sees, in their order.

    ``shape`` is that of one image's tokens. A map (rows, columns) has none, nor have as many
    tokens as the model has patches (the ``blocks`` of CaiT and XCiT, the first ones of ConViT). No
    more tokens than leading ones are these alone (CaiT's ``blocks_token_only``, XCiT's
    ``cls_attn_blocks``, VOLO's ``post_network``).
    """
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if len(shape) != 1 or shape[0] == patches:
        return ()
    return prefix_kinds(model)[: shape[0]]


def leading_kinds(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the leading tokens that each of some layers sees, by module name.

    The model runs once on an image of zeros. A layer that gets parts of an image (windows, the
    pixels of a patch) in the place of images sees no leading tokens; nothing is said of one that
    is called several times, or never.
    """
    if not prefix_kinds(model):
        return dict.fromkeys(names, ())
    return {name: kinds for name, (kinds, _) in _inputs(model, names).items()}


def token_plan(
    model: nn.Module, names: Iterable[str], per_image: int | None, *, seed: int = 0
) -> TokenPlan:
    """Plan to keep all leading tokens and ``per_image`` patches (None: all) at some layers."""
    prefix = len(prefix_kinds(model))
    inputs = _inputs(model, names).values() if prefix else ()
    alone = frozenset(tokens for kinds, tokens in inputs if not kinds)
    return TokenPlan(per_image, prefix, seed, patches_alone=alone)


def _inputs(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[tuple[str, ...], int]]:
    """Kinds of the leading tokens in what each layer gets of an image, and how many tokens it is.

    Of those that are called once.
    """
    calls: dict[str, list[torch.Size]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name) for name in calls}
    with evaluating(model), watch(modules, lambda name, x: calls[name].append(x.shape)):
        model(blank(model))
    shapes = {name: shapes[0] for name, shapes in calls.items() if len(shapes) == 1}
    return {  # what is not one image are parts of it
        name: (kinds_seen(model, shape[1:-1]) if shape[0] == 1 else (), shape[:-1].numel())
        for name, shape in shapes.items()
    }


def unread_kinds(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the tokens whose outputs at each of the ``sites`` nothing reads any more.

    There the gradient of the logits is exactly zero at every token of the kind, for a random
    image: at the patches ("patch") in the last block of a ViT whose head reads the CLS token
    alone, at the CLS token where it reads the mean of the patches. ``sites`` None: all MLPs.
    """
    return {
        name: tuple(kind for kind, is_read in read.items() if not is_read)
        for name, read in _read_kinds(model, sites).items()
    }


def unread_patches(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None = None
) -> frozenset[str]:
    """Return the names of the ``sites`` whose outputs at the patches nothing reads any more.

    As :func:`unread_kinds`; an MLP that gets no patches is one of them.
    """
    read_kinds = _read_kinds(model, sites)
    return frozenset(name for name, read in read_kinds.items() if not read.get("patch"))


def _read_kinds(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None
) -> dict[str, dict[str, bool]]:
    """Whether the output of any token of a kind is read, by site and kind."""
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    sites = find_mlps(model) if sites is None else sites
    gradients = output_gradients(model, sites, like(image, model), seeds=[(0, 0)], probes=1)
    leading = leading_kinds(model, gradients)
    found: dict[str, dict[str, bool]] = {}
    for name, gradient in gradients.items():
        read = gradient.flatten(0, 1).any(dim=2).any(dim=0).tolist()
        kinds, found[name] = leading[name], {}
        for kind, is_read in zip_longest(kinds, read, fillvalue="patch"):
            found[name][kind] = found[name].get(kind, False) or is_read
    return found
