import numpy as np
import pytest
import torch

from moee_analysis.extraction.record.tokens import leading_kinds
from moee_analysis.models.capture import capture
from moee_analysis.models.loading import build_model, find_mlps
from moee_analysis.models.patch_grid import patch_places
from tests.helpers.families import FAMILIES
from tests.helpers.models import pixels_of, toy_swin, toy_vit

REORDERED = ("small_hiera", "small_mobilevit", "small_nest", "small_tnt")
CELLS = 4  # rows and columns of cells of the image, one of which is made brighter


def unmixed(name):
    """A family with timm's own initial weights: tokens hardly know of each other."""
    torch.manual_seed(0)
    return build_model(name).requires_grad_(requires_grad=False)


def inputs_of(model, x):
    """What every MLP gets of the images ``x``, by name."""
    with capture(model, [site.name for site in find_mlps(model)]) as seen:
        model(x)
    return seen


def brightened(x):
    """Copies of an image, each with another cell brighter, and that cell's row and column."""
    where = [(row, column) for row in range(CELLS) for column in range(CELLS)]
    copies = x.repeat(len(where), 1, 1, 1)
    high, wide = x.shape[2] // CELLS, x.shape[3] // CELLS
    for copy, (row, column) in zip(copies, where, strict=True):
        copy[:, row * high : (row + 1) * high, column * wide : (column + 1) * wide] += 1
    return copies, np.array(where)


def centre(change):
    """Mean row and column of changes (images, rows, columns), each (images,)."""
    weight = change**2 / (change**2).sum(axis=(1, 2), keepdims=True)
    rows, columns = np.indices(change.shape[1:])
    return (weight * rows).sum(axis=(1, 2)), (weight * columns).sum(axis=(1, 2))


def agreement(model, *, places_of=patch_places):
    """How well the place of the tokens that change follows that of the bright cell, by layer.

    The lower correlation, that of rows or that of columns. Layers that get a map of rows and
    columns are left out, as are those without patches.
    """
    image = 0.1 * pixels_of(model, count=1)
    copies, where = brightened(image)
    inputs = inputs_of(model, torch.cat([image, copies]))
    leading, found = leading_kinds(model, inputs), {}
    for name, x in inputs.items():
        shape, first = (len(x) // (1 + len(copies)), *x.shape[1:-1]), len(leading[name])
        if x.ndim == 4 and "levels" not in name:  # of NesT, whose blocks are no rows
            continue
        places = places_of(model, name, shape, leading=first)
        if min(places.shape) > 1:
            tokens = x.reshape(1 + len(copies), -1, x.shape[-1])[:, first:]
            change = (tokens[1:] - tokens[0]).norm(dim=2).numpy()[:, places]
            both = zip(centre(change), where.T, strict=True)
            found[name] = min(np.corrcoef(seen, true)[0, 1] for seen, true in both)
    return found


def as_they_come(model, name, shape, *, leading=0):
    """Patches row by row, whatever the network."""
    places = patch_places(model, name, shape, leading=leading)
    return np.arange(places.size).reshape(places.shape)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_patch_has_one_place_where_a_bright_cell_changes_it(name):
    model = unmixed(name)
    assert all(value > 0.75 for value in agreement(model).values())
    inputs = inputs_of(model, pixels_of(model, count=1))
    leading = leading_kinds(model, inputs)
    for site, x in inputs.items():
        places = patch_places(model, site, tuple(x.shape[:-1]), leading=len(leading[site]))
        patches = x.shape[:-1].numel() - len(leading[site])
        assert np.array_equal(np.sort(places, axis=None), np.arange(patches))
        assert places.shape[0] == places.shape[1]  # as the images are


@pytest.mark.parametrize("name", REORDERED)
def test_where_tokens_do_not_stand_row_by_row_the_check_tells(name):
    found = agreement(unmixed(name), places_of=as_they_come)
    assert min(found.values()) < 0.6


def test_images_need_not_be_square():
    model = unmixed("small_mobilevit")
    model.pretrained_cfg["input_size"] = (3, 64, 128)
    assert all(value > 0.9 for value in agreement(model).values())
    shapes = [patch_places(model, "stages.1.1.transformer.0.mlp", (4, 32)).shape]
    shapes += [patch_places(toy_swin(), "layers.0.blocks.0.mlp", (1, 6, 9)).shape]
    assert shapes == [(8, 16), (6, 9)]


def test_places_that_are_not_known_are_a_single_row():
    model = toy_vit()
    assert patch_places(model, "blocks.0.mlp", (1, 17), leading=1).shape == (4, 4)
    for shape in [(1, 15), (4, 5), (2, 3, 3), (1, 2, 3, 4)]:
        places = patch_places(model, "blocks.0.mlp", shape)
        assert places.tolist() == [[*range(places.size)]]
