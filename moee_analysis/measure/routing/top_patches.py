"""What the experts of a routed model stand for on some images: mean inputs, typical patches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.routing.resolve import chosen_layers
from moee_analysis.measure.routing.routes import Routes, model_of, routes
from moee_analysis.models.evaluation_mode import evaluating
from moee_analysis.models.patch_grid import patch_places
from moee_analysis.moe.layer import moe_layers, moe_names
from moee_analysis.utils.checks import whole_number
from moee_analysis.utils.progress import progress

See = Callable[[int, torch.Tensor], None]


@dataclass(frozen=True)
class Typical:
    """How near the tokens of some images are to what their experts usually get, by layer.

    Attributes
    ----------
    means
        float64 (experts, dim): mean input of the tokens of each expert, NaN for one without tokens.
    common
        float64 (dim,): mean input of all tokens.
    cosines
        float32 (images, tokens): cosine between a token and the mean of its expert, both less the
        common mean; tokens in the order of ``Routes.experts``.
    """

    means: dict[int, np.ndarray]
    common: dict[int, np.ndarray]
    cosines: dict[int, np.ndarray]


def typical(
    model: Extraction | nn.Module, images: ImageSet, routed: Routes | None = None
) -> Typical:
    """Measure mean inputs and typical tokens in two passes over ``images``.

    The means are those of the tokens of ``images``, whatever the router compares them with, so
    that all kinds of routers can be looked at alike. Only layers with one expert per token.

    Parameters
    ----------
    routed
        The routes of ``model`` on the same images, if they are known.

    Raises
    ------
    MoeeError
        No layer with one expert per token.
    """
    model = model_of(model)
    routed = routed or routes(model, images)
    if not routed.experts:
        raise MoeeError(
            "a layer with one expert per token", f"none in '{routed.system}'",
            "typical tokens need to belong to one expert: use top-1 routers",
        )  # fmt: skip
    sums = _sums(model, images, routed)
    counts = {layer: _tokens_of(routed, layer) for layer in sums}
    with np.errstate(invalid="ignore"):
        means = {layer: sums[layer] / counts[layer][:, None] for layer in sums}
    common = {layer: sums[layer].sum(axis=0) / counts[layer].sum() for layer in sums}
    return Typical(means, common, _cosines(model, images, routed, (means, common)))


def top_patches(
    model: Extraction | nn.Module,
    images: ImageSet,
    *,
    layers: Sequence[int] = (),
    count: int = 12,
    routed: Routes | None = None,
    known: Typical | None = None,
) -> pd.DataFrame:
    """Find the patches that are most typical of each expert, at most one of an image.

    Parameters
    ----------
    layers
        Layers to show, counted from 0; empty: all whose patches have known places.
    count
        At most so many patches of an expert.
    routed, known
        Routes and typical tokens of ``model`` on the same images, if they are known.

    Returns
    -------
    DataFrame
        ``layer``, ``expert``, ``rank`` (0 is the most typical), ``image`` (its place in
        ``images``), ``class_name``, ``row``, ``column`` (of the patch), ``rows``, ``columns`` (of
        the grid), ``cosine``; ``tokens`` and ``images`` of the expert, ``share`` (of all patches).

    Raises
    ------
    MoeeError
        No layer with one expert per token whose patches have places, or another layer asked for; a
        count below 1.
    """
    whole_number("count", count)
    routed = routed or routes(model_of(model), images)
    shown = chosen_layers(routed.placed, layers)
    if not shown:
        raise MoeeError(
            "a layer whose patches have known places", f"none in '{routed.system}'",
            "extract experts of layers that see the patches of an image",
        )  # fmt: skip
    known = known or typical(model, images, routed)
    rows = [row for layer in shown for row in _top_of_layer(routed, known, layer, count)]
    table = pd.DataFrame(rows)
    table.attrs["caption"] = (
        f"Patches nearest to their expert's mean input by cosine, both less the layer's mean; at "
        f"most one of an image, of {len(images)} images."
    )
    return table


def _top_of_layer(
    routed: Routes, known: Typical, layer: int, count: int
) -> Iterator[dict[str, object]]:
    """Rows of :func:`top_patches` for one layer, expert by expert."""
    experts = routed.patch_experts(layer)
    patches = known.cosines[layer][:, routed.prefix_tokens[layer] :].reshape(experts.shape)
    _, rows, columns = experts.shape
    for expert in range(len(known.means[layer])):
        own = np.where(experts == expert, patches, -np.inf).reshape(len(experts), -1)
        best, where = own.max(axis=1), own.argmax(axis=1)
        order = np.argsort(-best, kind="stable")[: min(count, int(np.isfinite(best).sum()))]
        facts = {
            "tokens": int((experts == expert).sum()),
            "images": int(np.isfinite(best).sum()),
            "share": float((experts == expert).mean()),
        }
        for rank, image in enumerate(order):
            yield {
                "layer": layer,
                "expert": expert,
                "rank": rank,
                "image": int(image),
                "class_name": routed.class_names[int(routed.labels[image])],
                "row": int(where[image]) // columns,
                "column": int(where[image]) % columns,
                "rows": rows,
                "columns": columns,
                "cosine": float(best[image]),
                **facts,
            }


def _tokens_of(routed: Routes, layer: int) -> np.ndarray:
    """Tokens of each expert, float64 (experts,)."""
    return routed.counts[layer].sum(axis=0).astype(np.float64)


def _sums(model: nn.Module, images: ImageSet, routed: Routes) -> dict[int, np.ndarray]:
    """Sum of the inputs of each expert's tokens, float64 (experts, dim), by layer."""
    sums: dict[int, np.ndarray] = {}
    places = dict.fromkeys(routed.experts, 0)

    def see(layer: int, tokens: torch.Tensor) -> None:
        first = places[layer]
        places[layer] += len(tokens)
        experts = torch.from_numpy(routed.experts[layer][first : places[layer]].astype(np.int64))
        flat = tokens.flatten(0, 1)
        total = flat.new_zeros(routed.counts[layer].shape[1], flat.shape[1])
        total.index_add_(0, experts.flatten(), flat)
        sums[layer] = sums.get(layer, 0) + total.numpy()

    _see_tokens(model, images, routed, see)
    return sums


def _cosines(
    model: nn.Module,
    images: ImageSet,
    routed: Routes,
    usual: tuple[dict[int, np.ndarray], dict[int, np.ndarray]],
) -> dict[int, np.ndarray]:
    """Cosine of every token with its expert's mean, both less the common mean, by layer."""
    means, common = usual
    found: dict[int, list[np.ndarray]] = {layer: [] for layer in routed.experts}
    units = {layer: torch.from_numpy(_unit(means[layer] - common[layer])) for layer in means}

    def see(layer: int, tokens: torch.Tensor) -> None:
        first = sum(map(len, found[layer]))
        experts = routed.experts[layer][first : first + len(tokens)].astype(np.int64)
        centred = tokens - torch.from_numpy(common[layer])
        towards = units[layer][torch.from_numpy(experts)]
        lengths = centred.norm(dim=2).clamp_min(torch.finfo(torch.float64).tiny)
        found[layer].append(((centred * towards).sum(dim=2) / lengths).float().numpy())

    _see_tokens(model, images, routed, see)
    return {layer: np.concatenate(parts) for layer, parts in found.items()}


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1; those of experts without tokens, which nobody asks for, are 0."""
    vectors = np.nan_to_num(vectors)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.maximum(lengths, np.finfo(np.float64).tiny)


def _see_tokens(model: nn.Module, images: ImageSet, routed: Routes, see: See) -> None:
    """Show every layer's inputs to ``see``, float64 (images, tokens, dim), batch by batch.

    Tokens stand in the order of ``Routes.experts``: leading ones, then patches row by row.
    """
    batch_size = fitting_batch(model)
    batches = images.batches(model, batch_size=batch_size)
    like = next(model.parameters())
    total = math.ceil(len(images) / batch_size)
    size = [0]
    with evaluating(model), _watching(model, routed, see, size):
        for x in progress(batches, label="typical patches", total=total):
            size[0] = len(x)
            model(x.to(like))


@contextmanager
def _watching(model: nn.Module, routed: Routes, see: See, size: list[int]) -> Iterator[None]:
    """While open, ``see`` gets the inputs of the layers with one expert per token."""
    names, orders = moe_names(model), {}

    def order_of(layer: int, shape: tuple[int, ...]) -> np.ndarray:
        if layer not in orders:
            leading = routed.prefix_tokens[layer]
            places = patch_places(model, names[layer], shape, leading=leading).ravel()
            orders[layer] = np.concatenate([np.arange(leading), leading + places])
        return orders[layer]

    def hook(layer: int) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def look(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            (x,) = args
            order = order_of(layer, (x.shape[0] // size[0], *x.shape[1:-1]))
            see(layer, x.reshape(size[0], -1, x.shape[-1])[:, order].double().cpu())

        return look

    with ExitStack() as hooks:
        for layer, module in moe_layers(model).items():
            if layer in routed.experts:
                hooks.callback(module.register_forward_pre_hook(hook(layer)).remove)
        yield
