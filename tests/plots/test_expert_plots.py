from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from moee_analysis import measure, plots
from moee_analysis.errors import MoeeError
from moee_analysis.plots.drawing import expert_colours, thinned
from tests.helpers.made_routes import drawn_routes, masked_images
from tests.helpers.toys import toy_moe, toy_vit


@pytest.fixture(scope="module")
def tables():
    model, images = toy_moe(toy_vit()), masked_images(40)
    routes = [drawn_routes(each=10), drawn_routes(each=10, system="random centres", seed=1)]
    similarity = measure.similarity(model)
    return {
        "similarity": similarity,
        "similarity_summary": measure.similarity_summary(similarity),
        "sizes": measure.sizes(model),
        "neurons": measure.neurons(model),
        "overlap": measure.overlap(model),
        "modularity": measure.modularity(routes, images, permutations=5, resamples=5),
        "part_profile": measure.part_profile(routes, images),
        "embedding": embedded(),
    }


def embedded(clusters=5):
    rng = np.random.default_rng(0)
    tokens = pd.DataFrame(rng.normal(size=(300, 2)), columns=["x", "y"])
    return tokens.assign(layer=[2, 5] * 150, cluster=rng.integers(-1, clusters, size=300))


@pytest.mark.parametrize(
    "name",
    [
        "similarity", "similarity_summary", "sizes", "neurons", "overlap", "modularity",
        "part_profile", "embedding",
    ],
)  # fmt: skip
def test_draws_a_closed_figure_and_leaves_the_table_alone(tables, name):
    before = tables[name].copy()
    fig = getattr(plots, name)(tables[name], caption="my words")
    fig.savefig(io.BytesIO(), dpi=40)
    assert fig.texts[-1].get_text() == "my words"
    assert not plt.get_fignums()
    assert tables[name].equals(before)


def test_similarity_shows_both_cosines_in_the_same_order(tables):
    fig = plots.similarity(tables["similarity"].query("layer == 1"))
    raw, centred = (ax.images[0].get_array() for ax in fig.axes[:2])
    np.testing.assert_allclose(np.diag(raw), 1)
    np.testing.assert_allclose(np.diag(centred), 1)
    names = [[tick.get_text() for tick in ax.get_xticklabels()] for ax in fig.axes[:2]]
    assert names[0] == names[1]


def test_overlap_shows_what_was_found_above_what_is_expected(tables):
    table = tables["overlap"].query("layer == 0")
    image = plots.overlap(table).axes[0].images[0].get_array()
    by_pair = table.set_index(["expert_a", "expert_b"])
    assert image[0, 2] == by_pair.loc[(0, 2), "jaccard"]
    assert image[2, 0] == by_pair.loc[(2, 0), "expected_jaccard"]


def test_part_profile_shows_all_patches_first_and_the_parts_asked_for(tables):
    table = tables["part_profile"].query("system == 'MoEE' and layer == 0")
    ax = plots.part_profile(table, parts=3).axes[0]
    assert ax.get_yticklabels()[0].get_text() == "all"
    assert len(ax.get_xticklabels()) == 3
    everything = table.drop_duplicates("part")["share_all"].sort_values(ascending=False)
    np.testing.assert_allclose(ax.images[0].get_array()[0], everything[:3])


def test_sizes_draws_a_dot_per_expert(tables):
    ax = plots.sizes(tables["sizes"]).axes[0]
    heights = np.asarray(ax.collections[0].get_offsets())[:, 1]
    np.testing.assert_allclose(heights, tables["sizes"]["fraction"])


def test_embedding_says_how_much_is_noise():
    table = embedded().assign(cluster=-1)
    assert plots.embedding(table).axes[0].get_title(loc="left") == "layer 2: 0 clusters, 100% noise"


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
    fig = overlays(count)
    fig.savefig(io.BytesIO(), dpi=40)
    grid = np.array(fig.axes).reshape(4, count + 1)
    labels = [ax.get_ylabel() for ax in grid[:, 0]]
    assert labels == ["", "layer 0", "layer 1", "parts"]
    choice = grid[2, 0].images[1]
    assert choice.get_array().shape == (4, 4)
    assert choice.get_extent() == [-0.5, 15.5, 15.5, -0.5]
    assert not plt.get_fignums()


def test_patches_without_masks():
    assert len(overlays(masks=None).axes) == 3 * 4


def test_patches_gives_an_expert_the_same_colour_in_every_picture():
    fig = overlays(experts={0: np.arange(3).repeat(16).reshape(3, 4, 4)})
    drawn = [ax.images[1] for ax in fig.axes[4:7]]
    colours = [image.cmap(image.norm(image.get_array()))[0, 0, :3] for image in drawn]
    assert len({tuple(np.round(colour, 4)) for colour in colours}) == 3


def test_patches_of_different_images_are_refused():
    with pytest.raises(MoeeError, match="2 for names"):
        overlays(names=["a", "b"])
    with pytest.raises(MoeeError, match="2 for layer 1"):
        overlays(experts={1: np.zeros((2, 4, 4), int)})


def test_colours_of_experts_differ_and_do_not_depend_on_their_number():
    assert len(set(expert_colours(28))) == 28
    assert expert_colours(40)[:9] == expert_colours(9)
    assert len(expert_colours(40)) == 40


def test_thinned_names_keep_their_places():
    names = thinned([str(i) for i in range(20)], most=10)
    assert len(names) == 20
    assert names[:4] == ["0", "", "2", ""]
    assert thinned(["a", "b"]) == ["a", "b"]
