"""Routes drawn at random, with or without classes and parts that matter; nothing is run."""

from dataclasses import dataclass

import numpy as np

from moee_analysis.measure.routing.routes import Routes

GRID = (4, 4)
PARTS = ("sky", "ground", "wheel", "window", "body")


def made_routes(*, experts=None, labels=None, system="MoEE") -> Routes:
    """Routes from the expert of each token by layer, and the class of each image."""
    counts = {
        layer: np.stack([np.bincount(row, minlength=chosen.max() + 1) for row in chosen])
        for layer, chosen in experts.items()
    }
    tokens = {layer: chosen.shape[1] for layer, chosen in experts.items()}
    return Routes(
        counts={layer: one.astype(np.int32) for layer, one in counts.items()},
        experts={layer: one.astype(np.int16) for layer, one in experts.items()},
        labels=np.asarray(labels),
        class_names={int(c): f"class {c}" for c in np.unique(labels)},
        k=dict.fromkeys(experts, 1),
        prefix_tokens={layer: n - 16 for layer, n in tokens.items()},
        grid=dict.fromkeys(experts, GRID),
        tokens_per_image=tokens,
        system=system,
    )


def drawn_routes(
    *, classes=4, each=20, layers=(0, 1), effect=0.0, n_experts=6, seed=0, system="MoEE"
) -> Routes:
    """17 tokens an image; images differ, and with ``effect`` in (0, 1] so do classes."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    experts = {}
    for layer in layers:
        base = rng.dirichlet(np.full(n_experts, 5.0))
        of_class = rng.dirichlet(np.full(n_experts, 0.5), size=classes)
        mixed = (1 - effect) * base + effect * of_class[labels]
        shares = np.stack([rng.dirichlet(8 * row + 1e-3) for row in mixed])
        experts[layer] = np.stack([rng.choice(n_experts, 17, p=row) for row in shares])
        experts[layer][0, 0] = n_experts - 1  # every layer has all its experts
    return made_routes(experts=experts, labels=labels, system=system)


@dataclass(frozen=True)
class MaskedImages:
    """What the part measures ask of images: masks of 8 x 8 pixels over 4 x 4 patches."""

    masks: np.ndarray
    parts: tuple[str, ...] = PARTS
    name: str = "made"

    def __len__(self) -> int:
        return len(self.masks)

    def mask(self, index: int) -> np.ndarray:
        return self.masks[index]


def masked_images(count, *, seed=0) -> MaskedImages:
    """Sky above, ground below, and random objects in between."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(2, len(PARTS), size=(count, *GRID))
    patches[:, 0], patches[:, -1] = 0, 1
    return MaskedImages(np.kron(patches, np.ones((2, 2), dtype=int)).astype(np.uint8))
