"""Wide models that compute exactly what narrow ones do, in places that are left to chance.

Every channel stands twice, so that the norms see the same statistics, and the norms silence one of
the two; spare heads have no values and spare neurons never fire. What reads from silent places is
random. Narrowing has to find what matters.
"""

from __future__ import annotations

import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from tests.helpers.models import CLASSES, toy_vit

HEAD = 8  # dimensions of a head


def vit(heads: int, *, depth: int = 3) -> VisionTransformer:
    """A vision transformer with heads of 8 dimensions and 17 tokens."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=HEAD * heads, depth=depth, num_heads=heads,
        mlp_ratio=2, init_values=1.0, num_classes=len(CLASSES),
    )  # fmt: skip


def convnext(width: int) -> ConvNeXt:
    """A ConvNeXt of five blocks; its first stage has half the channels."""
    dims = (width // 2, width, width, width)
    return ConvNeXt(depths=(1, 2, 1, 1), dims=dims, ls_init_value=1.0, num_classes=len(CLASSES))


def lively_ones(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values everywhere, biases, norms and layer scales among them."""
    generator = torch.Generator().manual_seed(seed)
    model.pretrained_cfg = toy_vit().pretrained_cfg
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.5 * parameter + 0.3 * noise
    return model.eval().requires_grad_(requires_grad=False)


def widened_vit(narrow: VisionTransformer, *, seed: int = 0) -> VisionTransformer:
    """A model of twice the width, heads and hidden neurons, with the same outputs."""
    dim, depth = narrow.embed_dim, len(narrow.blocks)
    heads = narrow.blocks[0].attn.num_heads
    wide = lively_ones(vit(2 * heads, depth=depth), seed + 1)
    c = Doubled(dim, seed)
    wide.cls_token.data, wide.pos_embed.data = (
        narrow.cls_token[..., c.of],
        narrow.pos_embed[..., c.of],
    )
    c.writes(wide.patch_embed.proj, narrow.patch_embed.proj)
    for number, (w, n) in enumerate(zip(wide.blocks, narrow.blocks, strict=True)):
        for own in ("norm1", "norm2"):
            c.silences(getattr(w, own), getattr(n, own))
        for own in ("ls1", "ls2"):
            getattr(w, own).gamma.data = getattr(n, own).gamma[c.of]
        h, u = Doubled(heads, seed + number), Doubled(n.mlp.fc1.out_features, seed + number)
        _widen_attention(w.attn, n.attn, c, h)
        _widen_mlp(w.mlp, n.mlp, c, u)
    c.silences(wide.norm, narrow.norm)
    c.reads(wide.head, narrow.head)
    return wide


def widened_convnext(narrow: ConvNeXt, *, seed: int = 0) -> ConvNeXt:
    """A model of twice the channels of every stage, with the same outputs."""
    dims = [stage.blocks[0].mlp.fc1.in_features for stage in narrow.stages]
    wide = lively_ones(convnext(2 * dims[-1]), seed + 1)
    stages = [Doubled(dim, seed + number) for number, dim in enumerate(dims)]
    stages[0].writes(wide.stem[0], narrow.stem[0])
    stages[0].writes(wide.stem[1], narrow.stem[1])
    for number, c in enumerate(stages):
        w, n = wide.stages[number], narrow.stages[number]
        if number:
            before = stages[number - 1]
            before.silences(w.downsample[0], n.downsample[0])
            before.reads(w.downsample[1], n.downsample[1], rows=c)
        for block, (wb, nb) in enumerate(zip(w.blocks, n.blocks, strict=True)):
            c.writes(wb.conv_dw, nb.conv_dw)
            c.silences(wb.norm, nb.norm)
            wb.gamma.data = nb.gamma[c.of]
            _widen_mlp(wb.mlp, nb.mlp, c, Doubled(nb.mlp.fc1.out_features, seed + 7 * block))
    stages[-1].silences(wide.head.norm, narrow.head.norm)
    stages[-1].reads(wide.head.fc, narrow.head.fc)
    return wide


class Doubled:
    """Units that stand twice: ``of`` says which each was, ``heard`` which of the two is in use."""

    def __init__(self, count: int, seed: int) -> None:
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))
        self.of, self.heard = order % count, order < count

    def writes(self, wide: nn.Module, narrow: nn.Module) -> None:
        """Both copies get what the one had."""
        wide.weight.data, wide.bias.data = narrow.weight[self.of], narrow.bias[self.of]

    def silences(self, wide: nn.Module, narrow: nn.Module) -> None:
        """A norm leaves one copy at 0."""
        self.writes(wide, narrow)
        wide.weight.data[~self.heard] = 0
        wide.bias.data[~self.heard] = 0

    def reads(self, wide: nn.Module, narrow: nn.Module, *, rows: Doubled | None = None) -> None:
        """A map from these units; its weights for silent ones stay as they are, random."""
        weight, bias = narrow.weight, narrow.bias
        if rows is not None:
            weight, bias = weight[rows.of], bias[rows.of]
        wide.weight.data[:, self.heard] = weight[:, self.of[self.heard]]
        wide.bias.data = bias


def _widen_mlp(wide: nn.Module, narrow: nn.Module, channels: Doubled, neurons: Doubled) -> None:
    channels.reads(wide.fc1, narrow.fc1, rows=neurons)
    wide.fc1.weight.data[~neurons.heard] = 0
    wide.fc1.bias.data[~neurons.heard] = 0
    neurons.reads(wide.fc2, narrow.fc2, rows=channels)


def _widen_attention(wide: nn.Module, narrow: nn.Module, channels: Doubled, heads: Doubled) -> None:
    dims = _dimensions_of(heads)
    count = len(dims.of) // 2
    of = torch.cat([dims.of + part * count for part in range(3)])  # q, k, v
    heard = torch.cat([torch.ones(4 * count, dtype=torch.bool), dims.heard])
    channels.reads(wide.qkv, narrow.qkv, rows=_rows(of))
    wide.qkv.weight.data[~heard] = 0
    wide.qkv.bias.data[~heard] = 0
    dims.reads(wide.proj, narrow.proj, rows=channels)


def _dimensions_of(heads: Doubled) -> Doubled:
    dims = Doubled(HEAD * len(heads.of) // 2, 0)
    dims.of = (heads.of[:, None] * HEAD + torch.arange(HEAD)).flatten()
    dims.heard = heads.heard.repeat_interleave(HEAD)
    return dims


def _rows(of: torch.Tensor) -> Doubled:
    rows = Doubled(1, 0)
    rows.of = of
    return rows
