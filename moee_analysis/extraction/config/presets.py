"""The one dial of compute: everything that costs time derives from a preset unless given."""

from dataclasses import dataclass

from moee_analysis.utils.checks import one_of


@dataclass(frozen=True)
class Preset:
    """How much of everything; None means all there is."""

    calibration_images: int | None
    evaluation_images: int | None
    tokens_per_image: int  # patch tokens sampled from each image, beside the prefix tokens
    cluster_tokens: int  # tokens clustered per layer; all sampled tokens enter the statistics
    resamples: int  # bootstrap resamples of the images
    permutations: int  # label permutations of a null distribution
    training_images: int  # to fine-tune with, of the bundled scenes


PRESETS: dict[str, Preset] = {
    "smoke": Preset(96, 60, 6, 500, 50, 20, 40),
    "small": Preset(1000, 1000, 16, 8000, 500, 200, 600),
    "full": Preset(None, None, 32, 20000, 2000, 1000, 8000),
}


def preset_named(name: str) -> Preset:
    """Return the preset called ``name``; a MoeeError lists the names there are."""
    one_of("a preset", name, PRESETS)
    return PRESETS[name]
