"""Pictures of one colour beside black, and a ViT in which one expert alone knows each colour."""

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from moee_analysis.data.images import ImageSet
from moee_analysis.models.loading import find_mlps
from moee_analysis.moe.layer import MoeMlp, replace_module
from moee_analysis.moe.routers import NearestRouter

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "white": (1, 1, 1)}
BLACK = len(COLOURS)
SEEN = (
    4 * torch.tensor([*COLOURS.values(), (0, 0, 0)]).float() - 2
)  # once the model has scaled them


@dataclass(frozen=True)
class Coloured:
    """The left half in the colour of the class, the right half black; a faint number tells them.

    Its parts are the colours.
    """

    parts: tuple[str, ...] = (*COLOURS, "black")

    def picture(self, row: int) -> Image.Image:
        pixels = np.zeros((32, 32, 3), np.uint8)
        pixels[:, :16] = 255 * np.array(list(COLOURS.values())[row % BLACK])
        pixels[31, 31] = row % 8, row // 8, 0
        return Image.fromarray(pixels)

    def mask(self, row: int) -> np.ndarray:
        return np.where(np.arange(32) < 16, row % BLACK, BLACK)[None].repeat(32, axis=0)

    def digest(self, row: int) -> bytes:
        return hashlib.sha256(self.picture(row).tobytes()).digest()


def coloured_images(*rows: int) -> ImageSet:
    """Images of these numbers, dealt to the colours in turn."""
    folders = tuple(list(COLOURS)[row % BLACK] for row in rows)
    return ImageSet("colours", Coloured(), rows, folders)


def colour_model() -> nn.Module:
    """Each patch is its colour; layer 0 writes the colour's name elsewhere, and wipes the colour.

    Expert c, of the tokens of colour c, has the neuron that does so for its colour; the last expert
    is that of black, which the head does not read. Layer 1 is dense and does nothing, nor does
    attention, and the head adds up the names.
    """
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, mlp_ratio=2,
        num_classes=len(COLOURS), class_token=False, global_pool="avg", fc_norm=False,
    )  # fmt: skip
    for parameter in model.requires_grad_(requires_grad=False).parameters():
        parameter.zero_()
    for channel in range(3):
        model.patch_embed.proj.weight[channel, channel] = 1 / 64
    for block in model.blocks:
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    model.norm = nn.Identity()
    mlp, names = model.blocks[0].mlp, torch.arange(BLACK + 1)
    mlp.fc1.weight[names, :3] = SEEN
    mlp.fc2.weight[3 + names, names] = 1 / 12
    mlp.fc2.weight[:3, names] = -SEEN.T / 12
    model.head.weight[torch.arange(BLACK), 3 + torch.arange(BLACK)] = 8.0
    directions = torch.zeros(BLACK + 1, 16)
    directions[:, :3] = SEEN
    router = NearestRouter(directions, torch.zeros(BLACK + 1))
    shares = np.array([*[0.5 / BLACK] * BLACK, 0.5])
    experts = [np.array([expert]) for expert in range(BLACK + 1)]
    layer = MoeMlp(mlp, router, experts, shares)
    replace_module(model, find_mlps(model)[0].name, layer)
    model.pretrained_cfg = {
        "input_size": (3, 32, 32),
        "mean": (0.5, 0.5, 0.5),
        "std": (0.25, 0.25, 0.25),
        "crop_pct": 1.0,
        "label_names": tuple(COLOURS),
    }
    return model.eval()
