"""Small models that timm can rebuild, settings that cluster in a second, folders of pictures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from moee_analysis.extraction.cluster.clustering import ClusterConfig
from moee_analysis.extraction.config.extract_config import ExtractConfig
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.extraction.record.hooks import LayerSample
from moee_analysis.extraction.saving.layer_report import LayerReport
from moee_analysis.extraction.saving.provenance import provenance_of
from moee_analysis.models.loading import build_model, input_size
from moee_analysis.moe.layer import MoeMlp, all_mlps
from tests.helpers.toys import toy_images

if TYPE_CHECKING:
    from pathlib import Path

SMALL_VIT = "test_vit"  # timm's own test model: 6 blocks of width 64, 100 tokens and CLS
SMALL_CONVNEXT = "test_convnext"

CLUSTERING = ClusterConfig(
    reduce="pca", components=4, min_samples=3, min_cluster_size=0.05, max_cluster_size=0.6,
    max_noise=0.95,
)  # fmt: skip


MEANS = ClusterConfig(
    method="kmeans", space="inputs", reduce="none", count=4, min_samples=3, components=4
)


def lively(name: str = SMALL_VIT, *, seed: int = 0, **settings):
    """A timm model with weights large enough for its layers to disagree about tokens."""
    torch.manual_seed(seed)
    model = build_model(name, **settings)
    for key, parameter in model.named_parameters():
        if key.endswith("weight") and parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.requires_grad_(requires_grad=False)


def quick(**settings) -> ExtractConfig:
    """A configuration that takes a small model apart in well under a second."""
    defaults = {"tokens_per_image": 6, "cluster_tokens": 200, "clustering": CLUSTERING}
    if "macs_reduction" not in settings:
        defaults["variance_kept"] = 0.8
    return ExtractConfig(**{**defaults, **settings})


def best(**settings) -> ExtractConfig:
    """The recipe ``best`` with few experts, for models that are small."""
    return ExtractConfig(**{"recipe": "best", "clustering": MEANS, **settings})


def run_of(model) -> Extraction:
    """A run whose ``model`` has been given its routed layers by hand."""
    reports = tuple(_report(*numbered) for numbered in enumerate(all_mlps(model).items()))
    config = quick().resolved()
    return Extraction(model, config, 0.8, reports, provenance_of(model, toy_images(6), config))


def _report(index, named) -> LayerReport:
    name, mlp = named
    if not isinstance(mlp, MoeMlp):
        return LayerReport(index, name, mlp.fc1.out_features, converted=False, reason="")
    hidden = mlp.hidden_dense
    return LayerReport(
        index, name, hidden, converted=True, reason="", experts=mlp.n_experts,
        active_fraction=float(mlp.shares @ mlp.sizes.float()) / hidden,
        union_fraction=len(mlp.kept) / hidden, sizes=tuple(mlp.expert_sizes),
    )  # fmt: skip


def sample_of(hidden=None, *, inputs=None, weight=None, gradients=None, position=None, image=None):
    """A layer's sample of given values, one image; what is not given is zeros, the weights ones."""
    rows = len(next(v for v in (hidden, inputs, weight, position) if v is not None))
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


def divergence(dense, other, images) -> float:
    """Mean KL(dense || other) of the predictions for ``images``, in nats."""
    x = torch.cat(list(images.batches(dense)))
    with torch.inference_mode():
        p, q = (model(x).double().log_softmax(dim=1) for model in (dense, other))
    return float((p.exp() * (p - q)).sum(dim=1).mean())


def picture(seed: int, *, size: int = 32, mode: str = "RGB") -> Image.Image:
    """A picture of coloured noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, size=(size, size, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


def image_folder(root: Path, classes: dict[str, int], *, first: int = 0) -> Path:
    """``root`` filled with so many pictures for each class folder, numbered from ``first`` on."""
    for number, (name, count) in enumerate(classes.items()):
        folder = root / name
        folder.mkdir(parents=True)
        for index in range(count):
            picture(1000 * number + first + index).save(folder / f"{index}.png")
    return root


def pixels_of(model, *, count: int = 4, seed: int = 0) -> torch.Tensor:
    """Random input of the size that ``model`` wants."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *input_size(model), generator=generator)


def hooks_of(model) -> int:
    """Number of hooks on any module of ``model``."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def contents(folder: Path) -> dict[str, bytes]:
    """What the files of ``folder`` hold."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same_models(one, other) -> bool:
    """Whether two models have the same tensors, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
