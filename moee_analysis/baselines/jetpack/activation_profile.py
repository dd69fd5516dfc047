"""What activations say about channels, heads and hidden neurons: sums over all tokens of images."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from moee_analysis.baselines.jetpack.tensor_axes import heads_of
from moee_analysis.data.images import ImageSet
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.inputs import like
from moee_analysis.models.loading import find_mlps, fingerprint
from moee_analysis.utils.progress import progress
from moee_analysis.utils.storage.store import content_key, kept

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
    model: nn.Module,
    images: ImageSet,
    *,
    together: bool = False,
    store: str | Path | None = None,
) -> Profile:
    """Run ``model`` over the images once; nothing but sums is held.

    Parameters
    ----------
    together
        Whether pairs are counted as well.
    store
        Folder where the sums are kept and found again; None keeps nothing.
    """
    if store is None:
        return Profile(_sums(model, images, together=together))
    key = content_key(
        profile=1, model=fingerprint(model), images=images.fingerprint, together=together
    )
    folder = kept(Path(store), f"profile-{key}", partial(_fill, model, images, together=together))
    return Profile(load_file(folder / "sums.safetensors"))


def _fill(model: nn.Module, images: ImageSet, folder: Path, *, together: bool) -> None:
    save_file(_sums(model, images, together=together), folder / "sums.safetensors")


def _sums(model: nn.Module, images: ImageSet, *, together: bool) -> dict[str, torch.Tensor]:
    batches = images.batches(model, batch_size=BATCH)
    total = -(-len(images) // BATCH)
    with _adding(model, together=together) as sums, evaluating(model):
        for batch in progress(batches, label="profiling activations", total=total):
            model(like(batch, model))
    return {name: tensor.cpu() for name, tensor in sums.items()}


@contextmanager
def _adding(model: nn.Module, *, together: bool) -> Iterator[dict[str, torch.Tensor]]:
    """While open, every forward pass adds to the yielded sums."""
    places = {f"{name}.proj": (name, False) for name in heads_of(model)}
    for site in find_mlps(model):
        places[f"{site.name}.fc1"] = (f"{site.name}.fc1", together)
        places[f"{site.name}.fc2"] = (site.name, together)
    sums: dict[str, torch.Tensor] = {}
    with ExitStack() as hooks:
        for name, (place, pairs) in places.items():
            add = partial(_add, sums, place, pairs=pairs)
            hooks.callback(model.get_submodule(name).register_forward_pre_hook(add).remove)
        yield sums


def _add(
    sums: dict[str, torch.Tensor],
    place: str,
    _module: nn.Module,
    args: tuple[torch.Tensor],
    *,
    pairs: bool,
) -> None:
    tokens = args[0].detach().flatten(0, -2).float()
    active = (tokens > 0).float()
    part = {"L1": tokens.abs().sum(0), "L2": tokens.square().sum(0), "act_patrn": active.sum(0)}
    if pairs:
        part["together"] = active.T @ active
    part["tokens"] = torch.tensor(len(tokens))
    for kind, values in part.items():
        name = f"{place}.{kind}"
        # float64 sums: counts of many images are exact
        sums[name] = values.double() + sums.get(name, 0)
