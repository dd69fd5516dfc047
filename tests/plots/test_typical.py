from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from moee_analysis import plots
from moee_analysis.errors import MoeeError

PICTURES = [np.full((32, 48, 3), 50 * n, np.uint8) for n in range(4)]
TABLE = pd.DataFrame(
    {
        "layer": 2,
        "expert": [0, 0, 1],
        "rank": [0, 1, 0],
        "image": [3, 1, 2],
        "class_name": ["cat", "dog", "owl"],
        "row": [0, 3, 1],
        "column": [0, 5, 2],
        "rows": 4,
        "columns": 6,
        "cosine": [0.9, 0.8, 0.7],
        "tokens": [12, 12, 5],
        "images": [2, 2, 1],
        "share": [0.25, 0.25, 0.1],
    }
)


def all_axes(fig):
    return [ax for part in fig.subfigs for ax in part.axes]


def test_every_patch_is_framed_where_it_is_and_stays_in_view():
    fig = plots.top_patches(TABLE, PICTURES)
    fig.canvas.draw()
    drawn = [ax for ax in all_axes(fig) if ax.images]
    assert [ax.get_title(loc="center") for ax in drawn] == ["cat", "dog", "owl"]
    for ax, row in zip(drawn, TABLE.itertuples(), strict=True):
        frame = ax.patches[-1]
        assert (frame.get_x(), frame.get_y()) == (8 * row.column - 0.5, 8 * row.row - 0.5)
        left, right = sorted(ax.get_xlim())
        top, bottom = sorted(ax.get_ylim())
        assert left <= frame.get_x() <= frame.get_x() + 8 <= right
        assert top <= frame.get_y() <= frame.get_y() + 8 <= bottom
        assert int(ax.images[0].get_array()[0, 0, 0]) == 50 * row.image


def test_each_expert_has_a_title_with_its_share():
    fig = plots.top_patches(TABLE, PICTURES)
    titles = [part.get_suptitle() for part in fig.subfigs]
    assert titles[0].startswith("layer 2, expert 0: 25.0%")
    assert titles[1].startswith("layer 2, expert 1: 10.0%")


def test_an_expert_without_patches_is_told():
    with pytest.raises(MoeeError, match="no patch"):
        plots.top_patches(TABLE[:0], PICTURES)


def test_one_image_in_every_layer_with_the_numbers_of_its_experts():
    experts = {0: np.zeros((4, 4, 6), int), 5: np.tile(np.arange(6), (4, 4, 1))}
    masks = [np.zeros((32, 48), np.uint8)] * 4
    fig = plots.image_layers(PICTURES, experts, image=1, names=list("abcd"), masks=masks)
    titles = [ax.get_title(loc="center") for ax in fig.axes]
    assert titles == ["b", "its parts", "layer 0", "layer 5"]
    numbers = [sorted(text.get_text() for text in ax.texts) for ax in fig.axes]
    assert numbers == [[], [], ["0"], ["0", "1", "2", "3", "4", "5"]]


def test_parts_are_left_out_where_they_are_not_known():
    experts = {3: np.zeros((4, 2, 2), int)}
    fig = plots.image_layers(PICTURES, experts, image=0, names=list("abcd"))
    assert [ax.get_title(loc="center") for ax in fig.axes] == ["a", "layer 3"]
