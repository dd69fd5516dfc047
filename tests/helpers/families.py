"""Every family of timm whose MLPs can be taken apart, small, under names that timm can rebuild.

Importing this file registers them: ``lively("small_swin")`` is a Swin of four blocks. Sizes are
small and weights random; what stands in a block, and in which order its tokens come, is timm's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models import metaformer, register_model
from timm.models.byobnet import ByobNet, ByoModelCfg
from timm.models.coat import CoaT
from timm.models.csatv2 import CSATv2
from timm.models.efficientformer import EfficientFormer
from timm.models.gcvit import GlobalContextVit
from timm.models.hieradet_sam2 import HieraDet
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock
from timm.models.mobilevit import _inverted_residual_block, _mobilevit_block
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.sequencer import Sequencer2d
from timm.models.volo import VOLO
from torch import nn

from tests.helpers.models import CLASSES, lively


@dataclass(frozen=True)
class Family:
    """How a small model is made, and the side of its images in pixels."""

    make: Callable[..., nn.Module]
    size: int = 32

    def build(self, name: str, classes: int) -> nn.Module:
        """Build the model that is registered as ``name``."""
        model = self.make(num_classes=classes)
        model.pretrained_cfg = {
            "architecture": name, "input_size": (3, self.size, self.size), "crop_pct": 1.0,
            "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "label_names": CLASSES,
        }  # fmt: skip
        return model


def of_timm(name: str, **smaller: Any) -> Callable[..., nn.Module]:
    """Make timm's model ``name``, smaller."""
    return partial(timm.create_model, name, **smaller)


def vit(name: str, **settings: Any) -> Family:
    """A plain vision transformer: 4 x 4 patches of width 32, two blocks."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return Family(of_timm(name, **{**sizes, **settings}))


def swin(name: str) -> Family:
    """Windows of 4 x 4 tokens, plain and shifted, in two stages of 8 x 8 and 4 x 4."""
    sizes = {"img_size": 32, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2)}
    return Family(of_timm(name, window_size=4, **sizes))


def mobilevit() -> ByoModelCfg:
    """Two stages of unfolded 2 x 2 patches, of maps of 8 x 8 and 4 x 4."""
    one, other = ({"s": 2, "patch_size": 2, "br": 2.0, "transformer_depth": n} for n in (1, 2))
    return ByoModelCfg(
        blocks=(
            _inverted_residual_block(d=1, c=16, s=2, br=2.0),
            _mobilevit_block(d=1, c=24, transformer_dim=32, **one),
            _mobilevit_block(d=1, c=32, transformer_dim=48, **other),
        ),
        stem_chs=16, stem_type="3x3", stem_pool="", downsample="", act_layer="silu",
    )  # fmt: skip


MIXER = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "num_blocks": 2}
FOUR_STAGES = {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 40)}

FAMILIES: dict[str, Family] = {
    "small_vit": vit("vit_tiny_patch16_224"),
    "small_vit_registers": vit("vit_small_patch14_reg4_dinov2"),
    "small_vit_average": vit("vit_tiny_patch16_224", global_pool="avg"),
    "small_siglip": vit("vit_base_patch16_siglip_224"),
    "small_deit": vit("deit_tiny_patch16_224"),
    "small_deit_distilled": vit("deit_tiny_distilled_patch16_224"),
    "small_deit3": vit("deit3_small_patch16_224"),
    "small_beit": vit("beit_base_patch16_224"),
    "small_dinov3": vit("vit_small_patch16_dinov3"),
    "small_relpos": vit("vit_relpos_small_patch16_224"),
    "small_sam": vit("samvit_base_patch16_224", window_size=2),
    "small_convit": vit("convit_tiny", embed_dim=16, local_up_to_layer=1),
    "small_cait": vit("cait_xxs24_224", depth_token_only=2),
    "small_xcit": Family(of_timm("xcit_nano_12_p16_224", img_size=64, embed_dim=32, depth=2,
        num_heads=2), size=64),
    "small_naflexvit": Family(of_timm("naflexvit_base_patch16_gap", embed_dim=32, depth=2,
        num_heads=2), size=64),
    "small_tnt": Family(of_timm("tnt_s_patch16_224", img_size=32, patch_size=8, embed_dim=32,
        inner_dim=8, depth=2, num_heads_inner=2, num_heads_outer=2)),
    "small_pit": Family(of_timm("pit_ti_224", img_size=32, patch_size=8, stride=4,
        base_dims=(16, 16, 16), depth=(1, 1, 1), heads=(1, 2, 4))),
    "small_crossvit": Family(of_timm("crossvit_tiny_240", img_size=48, img_scale=(1.0, 2 / 3),
        patch_size=(12, 16), embed_dim=(16, 32), num_heads=(2, 2), depth=((1, 2, 0), (1, 1, 0))),
        size=48),
    "small_mixer": Family(partial(MlpMixer, **MIXER)),
    "small_resmlp": Family(partial(MlpMixer, mlp_ratio=4, block_layer=ResBlock,
        norm_layer=Affine, **MIXER)),
    "small_swin": swin("swin_tiny_patch4_window7_224"),
    "small_swinv2": swin("swinv2_tiny_window8_256"),
    "small_swinv2_cr": swin("swinv2_cr_tiny_224"),
    "small_convnext": Family(of_timm("convnext_tiny", **FOUR_STAGES), size=64),
    "small_davit": Family(of_timm("davit_tiny", depths=(1, 1), embed_dims=(16, 32),
        num_heads=(2, 2), window_size=4)),
    "small_hiera": Family(of_timm("hiera_tiny_224", img_size=(64, 64), embed_dim=16,
        stages=(1, 2, 1, 1)), size=64),
    "small_hieradet": Family(partial(HieraDet, embed_dim=16, stages=(1, 1, 2, 1),
        global_att_blocks=(3,), window_spec=(8, 4, 4, 2), head_init_scale=1.0), size=64),
    "small_mobilevit": Family(partial(ByobNet, mobilevit()), size=64),
    "small_edgenext": Family(of_timm("edgenext_xx_small", heads=(2, 2, 2, 2), **FOUR_STAGES),
        size=64),
    "small_twins": Family(of_timm("twins_svt_small", img_size=64, depths=(1, 2),
        embed_dims=(16, 32), num_heads=(2, 2), sr_ratios=(4, 2), mlp_ratios=(4, 4),
        wss=(4, 4)), size=64),
    "small_coat": Family(partial(CoaT, img_size=64, patch_size=4, embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 1, 1, 1), parallel_depth=1, num_heads=8), size=64),
    "small_volo": Family(partial(VOLO, (1, 1, 1, 1), img_size=64, embed_dims=(16, 32, 32, 32),
        num_heads=(2, 2, 2, 2), stem_hidden_dim=16, use_aux_head=True), size=64),
    "small_mvitv2": Family(partial(MultiScaleVit, MultiScaleVitCfg(depths=(1, 1, 1, 1),
        embed_dim=16), img_size=(64, 64), global_pool="avg"), size=64),
    "small_nest": Family(partial(Nest, img_size=64, embed_dims=(16, 16, 32), num_heads=(1, 2, 2),
        depths=(1, 1, 1)), size=64),
    "small_gcvit": Family(partial(GlobalContextVit, img_size=64, window_size=(2, 2, 2, 2),
        embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)), size=64),
    "small_maxvit": Family(of_timm("maxvit_rmlp_pico_rw_256", img_size=64, depths=(1, 1),
        embed_dim=(32, 64)), size=64),
    "small_sequencer": Family(partial(Sequencer2d, img_size=32, layers=(1, 1),
        patch_sizes=(4, 2), embed_dims=(16, 32), hidden_sizes=(8, 8), mlp_ratios=(3.0, 3.0))),
    "small_efficientformer": Family(partial(EfficientFormer, depths=(1, 1, 1, 2),
        embed_dims=(16, 16, 24, 32), num_vit=1), size=224),  # its attention: 7 x 7 tokens
    "small_csatv2": Family(partial(CSATv2, dims=(16, 16, 24, 32), depths=(1, 1, 1, 1),
        transformer_depths=(0, 0, 1, 1)), size=128),
    "small_caformer": Family(partial(metaformer.MetaFormer, depths=(1, 1, 1, 1),
        dims=(16, 16, 32, 32),
        token_mixers=[metaformer.SepConv] * 2 + [metaformer.Attention] * 2,
        norm_layers=[metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2),
        size=64),
}  # fmt: skip


def _register(name: str, family: Family) -> None:
    def build(*, num_classes: int = len(CLASSES), **_of_timm: Any) -> nn.Module:
        return family.build(name, num_classes)

    build.__name__, build.__module__ = name, __name__
    register_model(build)


for _name, _family in FAMILIES.items():
    _register(_name, _family)


def small(name: str, *, seed: int = 0) -> nn.Module:
    """The family ``name`` with random weights, all of whose branches count.

    Scales of branches and of norms that timm starts at (almost) nothing are drawn about 1.
    """
    model = lively(name, seed=seed)
    for key, parameter in model.named_parameters():
        if parameter.squeeze().ndim == 1 and key.rpartition(".")[2] != "bias":
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model
