"""What the experts of a routed model stand for on some images: mean inputs, typical patches."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn.functional import normalize

from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.measure.routing.inputs import Layers, Run, batches_of, model_of
from moee_analysis.measure.routing.routes import Routes, order_tokens, routes
from moee_analysis.measure.routing.tables import add_caption
from moee_analysis.models.capture import capture, evaluating
from moee_analysis.models.merging import seeing_tokens, spread
from moee_analysis.moe.layer import moe_names
from moee_analysis.utils.checks import whole_number


@dataclass(frozen=True)
class Typical:
    """How near the tokens of some images are to what their experts usually get, by layer.

    ``means``: float64 (experts, dim): mean input of each expert's tokens, NaN where it has none.
    ``common``: float64 (dim,): mean input of all tokens.
    ``cosines``: float32 (images, tokens): cosine between a token and the mean of its expert, both
      less the common mean; tokens in the order of ``Routes.experts``.
    """

    means: dict[int, np.ndarray]
    common: dict[int, np.ndarray]
    cosines: dict[int, np.ndarray]


def typical(model: Run, images: ImageSet, routed: Routes | None = None) -> Typical:
    """Measure mean inputs and typical tokens in two passes over ``images``.

    The means are those of the tokens of ``images``, whatever kind of router there is. ``routed``
    are their routes, if known. A MoeeError refuses a model with several experts per token.
    """
    model = model_of(model)
    routed = routed or routes(model, images)
    if not routed.experts:
        hint = "typical tokens need to belong to one expert: use top-1 routers"
        raise MoeeError("a layer with one expert per token", f"none in '{routed.system}'", hint)
    sums: dict[int, torch.Tensor] = {}
    for layer, tokens, experts in _tokens_of_layers(model, images, routed):
        shape = routed.counts[layer].shape[1], tokens.shape[2]
        total = tokens.new_zeros(shape).index_add_(0, experts.flatten(), tokens.flatten(0, 1))
        sums[layer] = sums.get(layer, 0) + total
    means, common, units = {}, {}, {}
    for layer, total in sums.items():
        counts = np.bincount(routed.experts[layer].ravel(), minlength=len(total)).astype(float)
        with np.errstate(invalid="ignore"):
            means[layer] = total.numpy() / counts[:, None]
        common[layer] = total.numpy().sum(axis=0) / counts.sum()
        # experts without tokens, which nobody asks for, have no direction
        centred = np.nan_to_num(means[layer] - common[layer])
        units[layer] = normalize(torch.from_numpy(centred), dim=1)
    cosines: dict[int, list[np.ndarray]] = {layer: [] for layer in sums}
    for layer, tokens, experts in _tokens_of_layers(model, images, routed):
        centred = tokens - torch.from_numpy(common[layer])
        lengths = centred.norm(dim=2).clamp_min(torch.finfo(torch.float64).tiny)
        cosine = (centred * units[layer][experts]).sum(dim=2) / lengths
        cosines[layer].append(cosine.float().numpy())
    found = {layer: np.concatenate(parts) for layer, parts in cosines.items()}
    return Typical(means, common, found)


def top_patches(
    model: Run,
    images: ImageSet,
    *,
    layers: Layers = (),
    count: int = 12,
    routed: Routes | None = None,
    known: Typical | None = None,
) -> pd.DataFrame:
    """Find the patches that are most typical of each expert, at most one of an image.

    ``layers`` empty: all whose patches have known places. ``routed`` and ``known`` are routes and
    typical tokens of ``model`` on the same images, if known.

    Columns: ``layer``, ``expert``, ``rank`` (0 is the most typical), ``image`` (its place in
    ``images``), ``class_name``, ``row``, ``column`` (of the patch), ``rows``, ``columns`` (of the
    grid), ``cosine``; ``tokens`` and ``images`` of the expert, ``share`` (of all patches).
    Raises MoeeError: no layer with one expert per token whose patches have places, a count below 1.
    """
    whole_number("count", count)
    routed = routed or routes(model_of(model), images)
    shown = routed.choose_placed(layers)
    known = known or typical(model, images, routed)
    rows = [row for layer in shown for row in _top_of_layer(routed, known, layer, count)]
    return add_caption(
        pd.DataFrame(rows),
        f"Patches nearest to their expert's mean input by cosine, both less the layer's mean; at "
        f"most one of an image, of {len(images)} images.",
    )


def _top_of_layer(routed: Routes, known: Typical, layer: int, count: int) -> Iterator[dict]:
    experts = routed.patch_experts(layer)
    patches = known.cosines[layer][:, routed.prefix_tokens[layer] :].reshape(experts.shape)
    _, rows, columns = experts.shape
    for expert in range(len(known.means[layer])):
        own = np.where(experts == expert, patches, -np.inf).reshape(len(experts), -1)
        best, place = own.max(axis=1), own.argmax(axis=1)
        used = int(np.isfinite(best).sum())  # images that the expert has a patch of
        for rank, image in enumerate(np.argsort(-best, kind="stable")[: min(count, used)]):
            row, column = divmod(int(place[image]), columns)
            name = routed.class_names[int(routed.labels[image])]
            yield {
                "layer": layer, "expert": expert, "rank": rank,
                "image": int(image), "class_name": name,
                "row": row, "column": column, "rows": rows, "columns": columns,
                "cosine": float(best[image]), "tokens": int((experts == expert).sum()),
                "images": used, "share": float((experts == expert).mean()),
            }  # fmt: skip


def _tokens_of_layers(
    model: nn.Module, images: ImageSet, routed: Routes
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield layers with one expert per token, batch by batch, their inputs, and the experts.

    float64 (images, tokens, dim) and int64 (images, tokens), in the order of ``Routes.experts``.
    """
    names = {layer: name for layer, name in moe_names(model).items() if layer in routed.experts}
    first = 0
    of_layers, seeing = list(names.values()), seeing_tokens
    with (
        evaluating(model), capture(model, of_layers) as inputs, seeing(model, of_layers) as left,
    ):  # fmt: skip
        for x in batches_of(model, images, label="typical patches"):
            model(x)
            for layer, name in names.items():
                tokens, leading = inputs[name], routed.prefix_tokens[layer]
                if name in left and left[name].place is not None:
                    tokens = spread(tokens, left[name].place)
                shape = (tokens.shape[0] // len(x), *tokens.shape[1:-1])
                order, _ = order_tokens(model, name, shape, leading=leading)
                tokens = tokens.reshape(len(x), -1, tokens.shape[-1])[:, order]
                experts = routed.experts[layer][first : first + len(x)].astype(np.int64)
                yield layer, tokens.double().cpu(), torch.from_numpy(experts)
            first += len(x)
