"""Which of timm's families can be taken apart: their MLPs, tokens and MACs, or the reason why not.

``python benchmarks/architectures.py`` prints the table of ``docs/architectures.md``, ``--out``
writes that file. Nothing is fetched or computed: models are built without values, on the device
``meta``, where only shapes are known.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from common import as_markdown
from torch import nn

from moee_analysis.extraction.record.tokens import capture_mlps, leading_kinds
from moee_analysis.models.attention import plain_attentions
from moee_analysis.models.loading import MlpSite, build_model, find_mlps, input_size
from moee_analysis.models.macs import count, count_parameters
from moee_analysis.models.survey import survey
from moee_analysis.utils.environment import versions

FAMILIES = {
    "ViT": "vit_tiny_patch16_224",
    "ViT, registers, average pooling": "vit_little_patch16_reg4_gap_256",
    "ViT, average pooling": "vit_medium_patch16_gap_256",
    "ViT, relative positions": "vit_relpos_small_patch16_224",
    "ViT of CLIP": "vit_base_patch32_clip_224", "ViT of SigLIP": "vit_base_patch16_siglip_224",
    "ViT of SAM": "samvit_base_patch16_224", "ViT, any aspect": "naflexvit_base_patch16_gap",
    "DINOv2": "vit_small_patch14_reg4_dinov2", "DINOv3": "vit_small_patch16_dinov3",
    "DeiT": "deit_tiny_patch16_224", "DeiT, distilled": "deit_tiny_distilled_patch16_224",
    "DeiT-3": "deit3_small_patch16_224", "BEiT": "beit_base_patch16_224",
    "EVA-02": "eva02_tiny_patch14_224", "CaiT": "cait_xxs24_224", "XCiT": "xcit_nano_12_p16_224",
    "ConViT": "convit_tiny", "CrossViT": "crossvit_tiny_240", "PiT": "pit_ti_224",
    "TNT": "tnt_s_patch16_224", "VOLO": "volo_d1_224", "CoaT": "coat_tiny",
    "Swin": "swin_tiny_patch4_window7_224", "Swin-v2": "swinv2_tiny_window8_256",
    "Swin-v2-CR": "swinv2_cr_tiny_224", "DaViT": "davit_tiny", "Twins": "twins_svt_small",
    "NesT": "nest_tiny", "GCViT": "gcvit_xxtiny", "MViT-v2": "mvitv2_tiny",
    "Hiera": "hiera_tiny_224", "Hiera of SAM 2": "hieradet_small",
    "MaxViT": "maxvit_rmlp_pico_rw_256", "MobileViT": "mobilevit_xxs",
    "MobileViT-v2": "mobilevitv2_050", "EdgeNeXt": "edgenext_xx_small",
    "EfficientFormer": "efficientformer_l1", "EfficientFormer-v2": "efficientformerv2_s0",
    "CSATv2": "csatv2", "ConvNeXt": "convnext_tiny",
    "ConvNeXt, 1 x 1 convolutions": "convnext_atto", "ConvNeXt-v2": "convnextv2_atto",
    "InceptionNeXt": "inception_next_atto", "MetaFormer": "caformer_s18",
    "PoolFormer": "poolformer_s12", "FocalNet": "focalnet_tiny_srf", "PVT-v2": "pvt_v2_b0",
    "LeViT": "levit_128s", "TinyViT": "tiny_vit_5m_224", "Visformer": "visformer_tiny",
    "FastViT": "fastvit_t8", "MLP-Mixer": "mixer_s16_224", "ResMLP": "resmlp_12_224",
    "gMLP": "gmlp_s16_224", "Sequencer": "sequencer2d_s",
}  # fmt: skip
COLUMNS = (
    "family", "timm model", "MLPs", "tokens x width (MLPs)", "leading tokens (MLPs)", "GMACs",
    "parameters", "MLPs' share of MACs", "taken apart by", "attentions", "stay dense",
)  # fmt: skip


def row(family: str) -> dict[str, str]:
    """The row of a family, by column."""
    with torch.device("meta"):
        model = build_model(FAMILIES[family])
        return {"family": family, "timm model": f"`{FAMILIES[family]}`"} | facts_of(model)


def facts_of(model: nn.Module) -> dict[str, str]:
    """What there is to say of a model."""
    found = survey(model)
    sites = find_mlps(model) if any(mlp.convertible for mlp in found) else []
    counted = count(model, sites=[site.name for site in sites])
    inside = sum(counted.by_module[site.name] for site in sites)
    left_out = [mlp for mlp in found if mlp.reason and "head" not in mlp.reason]  # a classifier's
    dense = Counter((mlp.kind, mlp.reason) for mlp in left_out)
    facts = {
        "MLPs": str(len(sites)),
        "GMACs": f"{counted.total / 1e9:.3f}",
        "parameters": f"{count_parameters(model) / 1e6:.1f} M",
        "stay dense": "; ".join(f"{n} {kind}: {reason}" for (kind, reason), n in dense.items()),
    }
    if not sites:
        return facts | {"taken apart by": "no recipe"}
    return facts | {
        "tokens x width (MLPs)": _listed(_shapes(model, sites)),
        "leading tokens (MLPs)": _listed(_leading(model, sites)),
        "MLPs' share of MACs": f"{inside / counted.total:.0%}",
        "taken apart by": "paper, best",
        "attentions": f"{len(plain_attentions(model)) or ''}",
    }


def _shapes(model: nn.Module, sites: Sequence[MlpSite]) -> list[str]:
    """What every MLP gets of one image: parts (windows) in its place, tokens of each, width."""
    with capture_mlps(model, sites) as captured, torch.inference_mode():
        model(torch.zeros(1, *input_size(model)))
        shapes = [captured[site.name]["inputs"].shape for site in sites]
    return [" x ".join(map(str, shape[1:] if shape[0] == 1 else shape)) for shape in shapes]


def _leading(model: nn.Module, sites: Sequence[MlpSite]) -> list[str]:
    """The leading tokens of every MLP, in words."""
    found = leading_kinds(model, [site.name for site in sites]).values()
    words = ([f"{n} {kind}" for kind, n in Counter(kinds).items()] for kinds in found)
    return [" + ".join(each) or "none" for each in words]


def _listed(found: Iterable[object]) -> str:
    """The different ones in their order, each with how many there are."""
    return ", ".join(f"{each} ({n})" for each, n in Counter(map(str, found)).items())


def table(rows: Sequence[dict[str, str]]) -> str:
    """Markdown of the rows."""
    return as_markdown(COLUMNS, [[row.get(name, "") for name in COLUMNS] for row in rows]) + "\n"


HEAD = """\
# Which models can be taken apart

`moee_analysis.survey(model)` says it of any model, MLP by MLP, with the reason against those that
stay dense; `find_mlps` finds the others. They are Linear-activation-Linear (`timm.layers.Mlp`), see
the tokens of an image, and stand in one place.

- *tokens x width (MLPs)*: what one image gives the MLPs, and how many of them get the same.
  `4 x 256` are windows that stand in the place of images. A feature map has rows x columns tokens.
- *leading tokens*: those that are no patches, and how many MLPs see them.
- *taken apart by*: the recipes that work. A small model of every such architecture is taken apart
  by both, saved, loaded, measured and trained in `tests/models/test_architectures.py`, with random
  weights. How much accuracy is kept takes trained weights to say.
- *attentions*: how many `attention="read"` and `attention="low_rank"` can act on.
- *stay dense*: other modules like MLPs, and why.

Written by `python benchmarks/architectures.py --out docs/architectures.md` (timm {timm}, torch
{torch}), which builds the models without weights. MACs as everywhere (`models/macs.py`), at the
size of the model's own images; parameters with the classifier.

"""


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--out", type=Path, help="file to write, as docs/architectures.md")
    options = parser.parse_args(argv)
    rows = [row(family) for family in options.families]
    if options.out is None:
        print(table(rows), end="")
    else:
        found = versions()
        head = HEAD.format(timm=found["timm"], torch=found["torch"])
        options.out.write_text(head + table(rows))


if __name__ == "__main__":
    main()
