"""Wide models that compute exactly what narrow ones do, in places that are left to chance.

Every channel stands twice, so that the norms see the same statistics, and the norms silence one of
the two; spare heads have no values and spare neurons never fire. What reads from silent places is
random. Narrowing has to find what matters.
"""

import torch
from timm.models.convnext import ConvNeXt
from timm.models.vision_transformer import VisionTransformer

from tests.helpers.models import CLASSES, toy_vit

HEAD = 8  # dimensions of a head


def vit(heads, *, depth=3):
    """A vision transformer with heads of 8 dimensions and 17 tokens."""
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=HEAD * heads, depth=depth, num_heads=heads,
        mlp_ratio=2, init_values=1.0, num_classes=len(CLASSES),
    )  # fmt: skip


def convnext(width):
    """A ConvNeXt of five blocks; its first stage has half the channels."""
    dims = (width // 2, width, width, width)
    return ConvNeXt(depths=(1, 2, 1, 1), dims=dims, ls_init_value=1.0, num_classes=len(CLASSES))


def lively_ones(model, seed=0):
    """Random values everywhere, biases, norms and layer scales among them."""
    generator = torch.Generator().manual_seed(seed)
    model.pretrained_cfg = toy_vit().pretrained_cfg
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.5 * parameter + 0.3 * noise
    return model.eval().requires_grad_(requires_grad=False)


def widened_vit(narrow, *, seed=0):
    """A model of twice the width, heads and hidden neurons, with the same outputs."""
    dim, depth = narrow.embed_dim, len(narrow.blocks)
    heads = narrow.blocks[0].attn.num_heads
    wide = lively_ones(vit(2 * heads, depth=depth), seed + 1)
    c = Doubled(dim, seed)
    for own in ("cls_token", "pos_embed"):
        getattr(wide, own).data = getattr(narrow, own)[..., c.of]
    c.writes(wide.patch_embed.proj, narrow.patch_embed.proj)
    for number, (w, n) in enumerate(zip(wide.blocks, narrow.blocks, strict=True)):
        for one in "12":
            c.silences(getattr(w, f"norm{one}"), getattr(n, f"norm{one}"))
            getattr(w, f"ls{one}").gamma.data = getattr(n, f"ls{one}").gamma[c.of]
        _widen_attention(w.attn, n.attn, c, Doubled(heads, seed + number, each=HEAD))
        _widen_mlp(w.mlp, n.mlp, c, Doubled(n.mlp.fc1.out_features, seed + number))
    c.silences(wide.norm, narrow.norm)
    c.reads(wide.head, narrow.head)
    return wide


def widened_convnext(narrow, *, seed=0):
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
            before.reads(w.downsample[1], n.downsample[1], rows=c.of)
        for block, (wb, nb) in enumerate(zip(w.blocks, n.blocks, strict=True)):
            c.writes(wb.conv_dw, nb.conv_dw)
            c.silences(wb.norm, nb.norm)
            wb.gamma.data = nb.gamma[c.of]
            _widen_mlp(wb.mlp, nb.mlp, c, Doubled(nb.mlp.fc1.out_features, seed + 7 * block))
    stages[-1].silences(wide.head.norm, narrow.head.norm)
    stages[-1].reads(wide.head.fc, narrow.head.fc)
    return wide


class Doubled:
    """Units of ``each`` dimensions that stand twice.

    ``of`` says which dimension each was, ``heard`` which of the two is in use.
    """

    def __init__(self, count, seed, *, each=1):
        order = torch.randperm(2 * count, generator=torch.Generator().manual_seed(seed))
        self.of = ((order % count)[:, None] * each + torch.arange(each)).flatten()
        self.heard = (order < count).repeat_interleave(each)

    def writes(self, wide, narrow):
        """Both copies get what the one had."""
        wide.weight.data, wide.bias.data = narrow.weight[self.of], narrow.bias[self.of]

    def silences(self, wide, narrow):
        """A norm leaves one copy at 0."""
        self.writes(wide, narrow)
        _silence(wide, ~self.heard)

    def reads(self, wide, narrow, *, rows=slice(None)):
        """A map from these units; its weights for silent ones stay as they are, random."""
        wide.weight.data[:, self.heard] = narrow.weight[rows][:, self.of[self.heard]]
        wide.bias.data = narrow.bias[rows].clone()


def _silence(module, rows):
    module.weight.data[rows] = 0
    module.bias.data[rows] = 0


def _widen_mlp(wide, narrow, channels, neurons):
    channels.reads(wide.fc1, narrow.fc1, rows=neurons.of)
    _silence(wide.fc1, ~neurons.heard)
    neurons.reads(wide.fc2, narrow.fc2, rows=channels.of)


def _widen_attention(wide, narrow, channels, heads):
    count = len(heads.of) // 2
    channels.reads(wide.qkv, narrow.qkv, rows=torch.cat([heads.of + n * count for n in range(3)]))
    values = torch.arange(4 * count, 6 * count)
    _silence(wide.qkv, values[~heads.heard])
    heads.reads(wide.proj, narrow.proj, rows=channels.of)
