"""Small random models: quick, deterministic, nothing fetched."""

import random

import numpy as np
import torch
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer

from moee_analysis.models.attention import Factors, Reduction, find_attentions, low_rank
from moee_analysis.models.capture import watch
from moee_analysis.models.loading import build_model, find_mlps, input_size
from moee_analysis.moe.layer import MoeMlp, Readout, replace_module
from moee_analysis.moe.routers import CosineRouter, NearestRouter, TokenKindRouter

CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox")
SMALL_VIT = "test_vit"  # timm's own test model: 6 blocks of width 64, 100 tokens and CLS
SMALL_CONVNEXT = "test_convnext"
TINY = {"depth": 2, "img_size": 64}  # SMALL_VIT of 2 blocks, 16 tokens and CLS


def toy_vit(*, depth: int = 3, seed: int = 0) -> VisionTransformer:
    """17 tokens (CLS and 4 x 4 patches) of width 32, 64 hidden neurons."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=depth, num_heads=2, mlp_ratio=2,
        num_classes=len(CLASSES),
    )  # fmt: skip
    return _ready(model)


def toy_swin(*, seed: int = 0) -> SwinTransformer:
    """8 x 8 tokens of width 16, then 4 x 4 of width 32."""
    torch.manual_seed(seed)
    model = SwinTransformer(
        img_size=32, patch_size=4, embed_dim=16, depths=(1, 1), num_heads=(2, 2), window_size=4,
        mlp_ratio=2, num_classes=len(CLASSES),
    )  # fmt: skip
    return _ready(model)


def _ready(model):
    model.pretrained_cfg = {
        "architecture": "toy",
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "crop_pct": 1.0,
        "label_names": CLASSES,
    }
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().requires_grad_(requires_grad=False)


def lively(name: str = SMALL_VIT, *, seed: int = 0, **settings):
    """A timm model with weights large enough for its layers to disagree about tokens."""
    torch.manual_seed(seed)
    model = build_model(name, **settings)
    for key, parameter in model.named_parameters():
        if key.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(requires_grad=False)


def toy_moe(model, *, n_experts: int = 4, seed: int = 0, layers=None):
    """``model`` itself, its MLPs replaced by random overlapping experts with cosine routers."""
    rng = np.random.default_rng(seed)
    for site in find_mlps(model):
        if layers is not None and site.index not in layers:
            continue
        sizes = rng.integers(site.hidden // 8, site.hidden // 2, size=n_experts)
        experts = [np.sort(rng.choice(site.hidden, s, replace=False)) for s in sizes]
        centres = torch.from_numpy(rng.normal(size=(n_experts, site.dim))).float()
        shares = rng.dirichlet(np.ones(n_experts))
        layer = MoeMlp(site.module(model), CosineRouter(centres), experts, shares)
        replace_module(model, site.name, layer)
    return model


def toy_kinds(model, *, seed: int = 0, layers=None):
    """A ViT itself with all that a routed layer can have.

    CLS has expert 0, the patches 1 to 3, of which the last is empty; W2 is refitted, and each
    expert has a shift of its own.
    """
    rng = np.random.default_rng(seed)
    tokens = model.patch_embed.num_patches + 1
    for site in find_mlps(model):
        if layers is not None and site.index not in layers:
            continue
        hidden, dim, drawn = site.hidden, site.dim, torch.Generator().manual_seed(seed)
        experts = [np.sort(rng.choice(hidden, s, replace=False)) for s in (hidden // 2, 9, 14, 0)]
        patches = NearestRouter(torch.randn(3, dim, generator=drawn), torch.zeros(3))
        weight = 0.1 * torch.randn(dim, hidden, generator=drawn)
        readout = Readout(weight, torch.randn(4, dim, generator=drawn))
        router = TokenKindRouter((0,), patches, tokens=tokens)
        shares = np.array([1, *(tokens - 1) * rng.dirichlet(np.ones(3))]) / tokens
        layer = MoeMlp(site.module(model), router, experts, shares, readout)
        replace_module(model, site.name, layer)
    return model


def reduced_attention(model, *, ranks=(5, 16), queries=None):
    """A ViT itself, the heads of its last attention cut to so many dimensions of scores, values."""
    site = find_attentions(model)[-1]
    maps = [torch.eye(site.head_dim)[:, :rank].expand(site.heads, -1, -1) for rank in ranks]
    scores, values = (Factors(each, each) for each in maps)
    reduction = Reduction(scores, values, torch.zeros(site.heads, site.head_dim), queries)
    replace_module(model, site.name, low_rank(site, site.module(model), reduction))
    return model


def pixels_of(model, *, count: int = 4, seed: int = 0) -> torch.Tensor:
    """Random input of the size that ``model`` wants."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *input_size(model), generator=generator)


def hooks_of(model) -> int:
    """Number of hooks on any module of ``model``."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def seen_by(module, model, images, **batches) -> list:
    """What a module of ``model`` gets and gives for ``images``, batch by batch."""
    seen = []
    with watch({0: module}, lambda _, both: seen.append(both), "both"), torch.no_grad():
        for x in images.batches(model, **batches):
            model(x)
    return seen


def same_models(one, other) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def divergence(dense, other, images) -> float:
    """Mean KL(dense || other) of the predictions for ``images``, in nats."""
    x = torch.cat(list(images.batches(dense)))
    with torch.inference_mode():
        p, q = (model(x).double().log_softmax(dim=1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def random_states() -> tuple:
    """Random states of Python, NumPy and torch, to compare."""
    numpy_state = np.random.get_state()[1].tolist()  # noqa: NPY002
    return random.getstate(), numpy_state, torch.get_rng_state().tolist()
