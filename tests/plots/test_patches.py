import numpy as np
import pandas as pd
import pytest

from moee_analysis import plots
from moee_analysis.errors import MoeeError
from tests.helpers.plot_tables import legend, words

PICTURES = [np.full((32, 48, 3), 50 * n, np.uint8) for n in range(4)]
TOP = pd.DataFrame(
    {
        "layer": 2, "expert": [0, 0, 1], "rank": [0, 1, 0], "image": [3, 1, 2],
        "class_name": ["cat", "dog", "owl"], "row": [0, 3, 1], "column": [0, 5, 2], "rows": 4,
        "columns": 6, "cosine": [0.9, 0.5, 0.8], "tokens": [12, 12, 5], "images": [2, 2, 1],
        "share": [0.25, 0.25, 0.1],
    }
)  # fmt: skip


def test_every_patch_is_framed_where_it_is_and_stays_in_view():
    fig = plots.top_patches(TOP, PICTURES, caption="my words")
    drawn = [ax for part in fig.subfigs for ax in part.axes if ax.images]
    assert [ax.get_title(loc="center") for ax in drawn] == ["cat", "dog", "owl"]
    for ax, row in zip(drawn, TOP.itertuples(), strict=True):
        x, y = ax.patches[-1].get_xy()
        assert (x, y) == (8 * row.column - 0.5, 8 * row.row - 0.5)
        for start, limits in ((x, sorted(ax.get_xlim())), (y, sorted(ax.get_ylim()))):
            assert limits[0] <= start <= start + 8 <= limits[1]
        assert int(ax.images[0].get_array()[0, 0, 0]) == 50 * row.image
    first, second = [part.get_suptitle() for part in fig.subfigs]
    assert first == "layer 2, expert 0: 25.0% of the patches, in 2 images"
    assert second.startswith("layer 2, expert 1: 10.0%")
    assert fig.texts[-1].get_text() == "my words"


def test_top_patches_need_a_patch():
    with pytest.raises(MoeeError, match="no patch"):
        plots.top_patches(TOP[:0], PICTURES)


@pytest.mark.parametrize(("plot", "given", "said"), [
    (plots.top_patches, [TOP],
     ["Of 2 experts expert 0 of layer 2 takes 25.0 % of the patches",
      "expert 1 of layer 2 takes 10.0 %",
      "most alike for expert 1 of layer 2: all have a cosine of 0.80 or more"]),
    (plots.top_patches, [TOP[:2]],
     ["Expert 0 of layer 2 takes 25.0 % of the patches, in 2 images.", "0.50 or more"]),
    (plots.top_patches, [TOP[:0]], ["No patch"]),
    (plots.image_layers,
     [[0, 0], {0: np.zeros((2, 2, 2), int), 5: np.array([[[0, 1], [2, 3]], [[0, 0], [0, 1]]])}],
     ["one of 2 images, on average, meet 1 experts in layer 0 and 3 experts in layer 5"]),
    (plots.image_layers, [[], {}], ["no layer"]),
    (plots.pieces, [[0, 0], {2: np.arange(8).reshape(2, 2, 2), 5: np.zeros((2, 2, 2), int)}],
     ["Of the 4 patches of one of 2 images, on average, 4 tokens after layer 2 and 1 tokens"]),
    (plots.pieces, [[], {}], ["no layer"]),
    (plots.patches, [PICTURES[:1], {3: np.array([[[0, 0], [1, 1]]])}],
     ["1 picture. Layer 3: 2 experts take the patches, and 50.0 % of neighbouring patches "
      "share one (by chance 50.0 %)."]),
    (plots.patches, [[], {}], ["no layer"]),
    (plots.patches, [[], {0: np.zeros((1, 1, 1), int)}],
     ["1 expert takes the patches, and unknown of"]),
])  # fmt: skip
def test_pictures_are_described(plot, given, said):
    found = plots.describe(plot, *given)
    assert [words in found for words in said] == [True] * len(said)


@pytest.mark.parametrize("known", [True, False])
def test_one_image_in_every_layer_with_the_numbers_of_its_experts(known):
    experts = {0: np.zeros((4, 4, 6), int), 5: np.tile(np.arange(6), (4, 4, 1))}
    masks = [np.zeros((32, 48), np.uint8)] * 4 if known else None
    axes = plots.image_layers(PICTURES, experts, image=1, names=list("abcd"), masks=masks).axes
    names = ["b", *["its parts"] * known, "layer 0", "layer 5"]
    assert [ax.get_title(loc="center") for ax in axes] == names
    numbers = [sorted(words(ax.texts)) for ax in axes[-2:]]
    assert numbers == [["0"], ["0", "1", "2", "3", "4", "5"]]


def overlays(count=3, **changes):
    rng = np.random.default_rng(0)
    given = {
        "pictures": rng.integers(0, 256, size=(count, 16, 16, 3), dtype=np.uint8),
        "experts": {1: rng.integers(0, 12, size=(count, 4, 4)), 0: np.zeros((count, 4, 4), int)},
        "names": [f"image {i}" for i in range(count)],
        "masks": rng.integers(0, 3, size=(count, 16, 16)),
        "parts": ("sky", "ground", "wheel"),
    } | changes
    return plots.patches(given.pop("pictures"), given.pop("experts"), **given)


@pytest.mark.parametrize("count", [1, 3])
def test_patches_lays_experts_over_pictures_layer_by_layer(count):
    grid = np.array(overlays(count).axes).reshape(4, count + 1)
    assert [ax.get_ylabel() for ax in grid[:, 0]] == ["", "layer 0", "layer 1", "parts"]
    choice = grid[2, 0].images[1]
    assert choice.get_array().shape == (4, 4)
    assert choice.get_extent() == [-0.5, 15.5, 15.5, -0.5]
    assert sorted(legend(grid[3, -1])) == ["ground", "sky", "wheel"]


def test_patches_without_masks_give_an_expert_the_same_colour_in_every_picture():
    fig = overlays(experts={0: np.arange(3).repeat(16).reshape(3, 4, 4)}, masks=None)
    assert len(fig.axes) == 2 * 4
    drawn = [ax.images[1] for ax in fig.axes[4:7]]
    colours = [image.cmap(image.norm(image.get_array()))[0, 0, :3] for image in drawn]
    assert len({tuple(np.round(colour, 4)) for colour in colours}) == 3


def test_pieces_have_the_mean_colour_of_their_pixels_and_lines_around_them():
    picture = np.zeros((4, 6, 3), np.uint8)
    picture[:, 4:] = 240
    tokens = {3: np.array([[[7, 7, 2], [7, 7, 7]]])}
    ax = plots.pieces([picture], tokens, names=["a"]).axes[1]
    assert ax.get_ylabel() == "layer 3"
    shown = 255 * np.asarray(ax.images[0].get_array())
    assert shown[0, 5] == pytest.approx(240)  # alone
    for place in ((0, 0), (3, 5)):
        assert shown[place] == pytest.approx(48)  # a fifth of the pixels
    lines = np.array(ax.collections[0].get_segments()) + 0.5
    assert lines.tolist() == [[[4, 2], [6, 2]], [[4, 0], [4, 2]]]


@pytest.mark.parametrize(("count", "changes", "message"), [
    (3, {"names": ["a", "b"]}, "2 for names"),
    (3, {"experts": {1: np.zeros((2, 4, 4), int)}}, "2 for layer 1"),
    (0, {}, "no picture"),
])  # fmt: skip
def test_patches_of_different_images_are_refused(count, changes, message):
    with pytest.raises(MoeeError, match=message):
        overlays(count, **changes)
