"""The origin of a run, and whether a dense model is the one that it was made from."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moee_analysis.data.disjoint import contents_of
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import ExtractConfig
from moee_analysis.extraction.saving.rebuild import arguments_of, dtype_of, input_facts
from moee_analysis.models.fingerprints import identity
from moee_analysis.models.loading import architecture, load_model
from moee_analysis.utils.environment import versions


def provenance_of(model: nn.Module, images: ImageSet, config: ExtractConfig) -> dict[str, Any]:
    """Facts of the model and the images that a run is made from, as plain JSON values.

    ``contents`` are hashes of the pictures, which no evaluation may see again.
    """
    found = identity(model)
    return {
        "model": architecture(model),
        "arguments": arguments_of(model),
        "dtype": dtype_of(model),
        "weights_file": model.pretrained_cfg.get("file"),
        "weights_sha256": found.weights,
        "transform_sha256": found.transform,
        "answers": list(found.answers),
        "images": images.name,
        "n_images": len(images),
        "images_sha256": images.fingerprint,
        "contents": contents_of(images),
        "seed": config.seed,
        "versions": versions(),
    }


def load_dense(
    provenance: Mapping[str, Any], weights: str | Path | None, *, like: nn.Module
) -> nn.Module:
    """Load the dense model of a run; ``weights`` are where they are now, if they have moved.

    Images and classes are those of the run's own model, which it is ``like``.

    Raises MoeeError: no such file; another model than the one the run was made from.
    """
    file = weights or provenance["weights_file"]
    if file is not None and not Path(file).is_file():
        raise MoeeError(
            f"the dense weights of this run at '{file}'", "no such file",
            "pass the weights the run was extracted from (--weights FILE)",
        )  # fmt: skip
    model = load_model(provenance["model"], weights=file, **provenance.get("arguments", {}))
    model.to(getattr(torch, provenance.get("dtype", "float32")))
    model.pretrained_cfg = {**model.pretrained_cfg, **input_facts(like)}
    check_dense(model, provenance, source=file or "hub")
    return model


def check_dense(model: nn.Module, provenance: Mapping[str, Any], *, source: str | Path) -> None:
    """Refuse a model from ``source`` that is not the one the run was made from."""
    found = identity(model)
    expected = replace(
        found,
        weights=provenance["weights_sha256"],
        transform=provenance.get("transform_sha256", found.transform),  # not in format 5
        answers=tuple(provenance.get("answers", found.answers)),
    )
    if difference := expected.difference(found):
        raise MoeeError(
            "the dense model this run was extracted from", f"{difference} ({source})",
            "pass the original weights (--weights FILE), or extract again",
        )  # fmt: skip
