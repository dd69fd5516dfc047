"""What activations say about channels, heads and hidden neurons: sums over all tokens of images."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moee_analysis.baselines.jetpack.narrow_model import heads_of
from moee_analysis.data.images import ImageSet
from moee_analysis.models.capture import evaluating, watch
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import find_mlps, fingerprint
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key, get_or_build

BATCH = 32  # images


@dataclass(frozen=True)
class Profile:
    """Sums over the tokens of all images, by place, float64.

    ``tensors`` are called ``<place>.<kind>``. Places are ``<mlp>`` (hidden neurons, after the
    activation), ``<mlp>.fc1`` (channels, as the MLP sees them) and ``<attention>`` (what its
    projection sees). The kinds are ``L1`` (magnitudes), ``L2`` (squares), ``act_patrn`` (how often
    it is positive), ``together`` (how often two are positive at once, units x units; of MLPs alone,
    where it was asked for) and ``tokens``.
    """

    tensors: dict[str, torch.Tensor]

    def worth(self, place: str, metric: str) -> np.ndarray:
        """Activation of every unit, per token: mean magnitude, root mean square, or share."""
        mean = self.tensors[f"{place}.{metric}"] / self.tensors[f"{place}.tokens"]
        return (mean.sqrt() if metric == "L2" else mean).numpy()

    def together(self, place: str) -> np.ndarray:
        """How often any two units are positive for the same token, (units, units)."""
        return self.tensors[f"{place}.together"].numpy()


def profile(
    model: nn.Module, images: ImageSet, *, together: bool = False, store: str | Path | None = None
) -> Profile:
    """Run ``model`` over the images once and add up its activations.

    - ``together``: whether pairs are counted as well.
    - ``store``: folder where the sums are kept and found again; None keeps nothing.
    """
    if store is None:
        return Profile(_sums(model, images, together=together))
    key = content_key(
        profile=1, model=fingerprint(model), images=images.fingerprint, together=together
    )
    folder = get_or_build(
        Path(store), f"profile-{key}", partial(_fill, model, images, together=together)
    )
    return Profile(load_file(folder / "sums.safetensors"))


def _fill(model: nn.Module, images: ImageSet, folder: Path, *, together: bool) -> None:
    save_file(_sums(model, images, together=together), folder / "sums.safetensors")


def _sums(model: nn.Module, images: ImageSet, *, together: bool) -> dict[str, torch.Tensor]:
    places = {name: f"{name}.proj" for name in heads_of(model)}
    mlps = [site.name for site in find_mlps(model)]
    places |= {f"{name}.fc1": f"{name}.fc1" for name in mlps}
    places |= {name: f"{name}.fc2" for name in mlps}
    modules = {place: model.get_submodule(name) for place, name in places.items()}
    paired = {place for name in mlps for place in (name, f"{name}.fc1") if together}
    sums: dict[str, torch.Tensor] = {}

    def add(place: str, x: torch.Tensor) -> None:
        _add(sums, place, x.detach().flatten(0, -2).float(), pairs=place in paired)

    total = -(-len(images) // BATCH)
    batches = images.batches(model, batch_size=BATCH)
    with watch(modules, add), evaluating(model):
        for batch in progress(batches, label="profiling activations", total=total):
            model(like(batch, model))
    return {name: tensor.cpu() for name, tensor in sums.items()}


def _add(sums: dict[str, torch.Tensor], place: str, tokens: torch.Tensor, *, pairs: bool) -> None:
    active = (tokens > 0).float()
    part = {"L1": tokens.abs().sum(0), "L2": tokens.square().sum(0), "act_patrn": active.sum(0)}
    if pairs:
        part["together"] = active.T @ active
    part["tokens"] = torch.tensor(len(tokens))
    for kind, values in part.items():
        name = f"{place}.{kind}"
        # float64 sums: counts of many images are exact
        sums[name] = values.double() + sums.get(name, 0)
