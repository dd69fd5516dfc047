"""Tokens are not all alike: what the leading ones are, and whose outputs nothing reads."""

import math
import re
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.extraction.record.fisher import output_gradients
from moee_analysis.extraction.record.recorded_tokens import TokenPlan
from moee_analysis.models.attention import AttentionSite
from moee_analysis.models.capture import watch
from moee_analysis.models.evaluation_mode import evaluating
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
    shapes = _shapes(model, names) if prefix_kinds(model) else dict.fromkeys(names, (1, 0))
    return {name: _kinds_of_input(model, shape) for name, shape in shapes.items()}


def token_plan(
    model: nn.Module, names: Iterable[str], per_image: int | None, *, seed: int = 0
) -> TokenPlan:
    """Plan to keep all leading tokens and ``per_image`` patches (None: all) at some layers."""
    prefix = len(prefix_kinds(model))
    shapes = _shapes(model, names) if prefix else {}
    alone = {math.prod(s[:-1]) for s in shapes.values() if not _kinds_of_input(model, s)}
    return TokenPlan(per_image, prefix, seed, patches_alone=frozenset(alone))


def _kinds_of_input(model: nn.Module, shape: Sequence[int]) -> tuple[str, ...]:
    """Kinds of the leading tokens in an input (parts of an image, *tokens, dim)."""
    return kinds_seen(model, shape[1:-1]) if shape[0] == 1 else ()


def _shapes(model: nn.Module, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """Shapes of what each layer gets of one image, if it is called once."""
    calls: dict[str, list[tuple[int, ...]]] = {name: [] for name in names}
    modules = {name: model.get_submodule(name) for name in calls}
    with evaluating(model), watch(modules, lambda name, x: calls[name].append(tuple(x.shape))):
        model(blank(model))
    return {name: shapes[0] for name, shapes in calls.items() if len(shapes) == 1}


def unread_kinds(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None = None
) -> dict[str, tuple[str, ...]]:
    """Return the kinds of the tokens whose outputs at each of the ``sites`` nothing reads any more.

    There the gradient of the logits is exactly zero at every token of the kind, for a random
    image: at the patches ("patch") in the last block of a ViT whose head reads the CLS token
    alone, at the CLS token where it reads the mean of the patches. ``sites`` None: all MLPs.
    """
    return {
        name: tuple(dict.fromkeys(kind for kind in kinds if kind not in read))
        for name, (kinds, read) in _read_kinds(model, sites).items()
    }


def unread_patches(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None = None
) -> frozenset[str]:
    """Return the names of the ``sites`` whose outputs at the patches nothing reads any more.

    As :func:`unread_kinds`; an MLP that gets no patches is one of them.
    """
    kinds_read = _read_kinds(model, sites)
    return frozenset(name for name, (_, read) in kinds_read.items() if "patch" not in read)


def _read_kinds(
    model: nn.Module, sites: Sequence[MlpSite | AttentionSite] | None
) -> dict[str, tuple[tuple[str, ...], set[str]]]:
    """The kinds of the tokens at each site, and those of which some output is read."""
    image = torch.randn(1, *input_size(model), generator=torch.Generator().manual_seed(0))
    sites = find_mlps(model) if sites is None else sites
    gradients = output_gradients(model, sites, like(image, model), seeds=[(0, 0)], probes=1)
    leading = leading_kinds(model, gradients)
    found = {}
    for name, gradient in gradients.items():
        read = gradient.flatten(0, 1).any(dim=2).any(dim=0).tolist()
        kinds = (*leading[name], *["patch"] * (len(read) - len(leading[name])))
        found[name] = kinds, {kind for kind, is_read in zip(kinds, read, strict=True) if is_read}
    return found
