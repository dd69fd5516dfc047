"""A small table for every plot, with numbers whose figure and sentence are known."""

import itertools
import json
import math
from functools import cache, partial
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.ticker import FixedLocator

from moee_analysis import plots

NAN, INF = math.nan, math.inf
CAPTION = "A made-up table; 95 % intervals of nothing."
PIECES = {"order": ("variance", "obs"), "refit": ("none", "shared"), "clustering": ("a", "b of c")}
KL = {"as it is": 0.04, "order": 0.1, "refit": 0.2, "clustering": 0.03, "control": 0.4}


def _rows(columns, *rows, **constant):
    return pd.DataFrame(rows, columns=columns.split()).assign(**constant)


def _with_ends(table, **prefixes):
    """Ends of intervals of columns, a fifth off, under their prefixes."""
    for column, prefix in prefixes.items():
        ends = {f"{prefix}low": 0.8 * table[column], f"{prefix}high": 1.2 * table[column]}
        table = table.assign(**ends)
    return table


def _kept(*experts):
    """Neurons of experts as text: ``x`` is kept, ``.`` is not."""
    cells = [(*key, n, n, mark == "x") for *key, marks in experts for n, mark in enumerate(marks)]
    return _rows("layer expert neuron order kept", *cells, system="MoEE")


def _pairs(columns, *rows):
    """Pairs a < b of all experts of a layer, the other way round too, and each with itself."""
    table = _rows(f"layer expert_a expert_b {columns}", *rows, system="MoEE")
    other = table.rename(columns={"expert_a": "expert_b", "expert_b": "expert_a"})
    itself = pd.concat([table, other]).drop_duplicates(["layer", "expert_a"])
    itself = itself.assign(expert_b=itself["expert_a"], **dict.fromkeys(columns.split(), 1.0))
    table = pd.concat([table, other, itself], ignore_index=True)
    return table.assign(order_a=table["expert_a"], order_b=table["expert_b"])


def _square(names, order, **values):
    """All pairs of three things, with both ends of each fact, from matrices of values."""
    ends = dict(zip("ab", np.indices((3, 3)).reshape(2, -1), strict=True))
    facts = {**names, "order": order}
    columns = {f"{k}_{end}": np.array(f)[i] for k, f in facts.items() for end, i in ends.items()}
    return pd.DataFrame(columns | {name: np.ravel(each) for name, each in values.items()})


def _starts():
    lead = np.array([[0, 0.2, 0.05], [-0.2, 0, -0.15], [-0.05, 0.15, 0]])
    half = np.array([[0, 0.1, 0.1], [0.1, 0, 0.2], [0.1, 0.2, 0]])
    values = {"difference": lead, "low": lead - half, "high": lead + half, "beats": lead > half}
    return _square({"start": ["a", "b", "c"]}, [0, 1, 2], **values)


def _classes():
    js = [[0, 0.6, 0.05], [0.6, 0, 0.4], [0.05, 0.4, 0]]
    floor = [[0, 0.02, 0.01], [0.02, 0, 0.03], [0.01, 0.03, 0]]
    names = {"class": ["pug", "cliff", "cat"], "class_index": [0, 1, 2]}
    families = {"family": ["animal", "scenery", "animal"]}
    table = _square(names | families, [0, 2, 1], js=js, floor=floor)
    return table.assign(system="MoEE", layer=3)


def _knocked_out():
    """Two layers of two and three experts; three classes of two families."""
    groups = (("all", "all", ""), ("class", "red_one", "warm"), ("class", "green", "cold"),
              ("class", "blue", "warm"))  # fmt: skip
    rows = []
    for layer, expert in ((0, 0), (0, 1), (4, 0), (4, 1), (4, 2)):
        for what, system in itertools.product(("removed", "alone"), ("expert", "random tokens")):
            change = (-0.02 if what == "removed" else -0.4) * (expert + 1 + (layer == 4))
            change /= 1 + (system == "random tokens")
            for place, (kind, group, family) in enumerate(groups, start=-1):
                share = 0.4 if kind == "all" else 0.1 * (1 + expert) + 0.05 * place
                logp = NAN if kind == "all" else change * (1 + place)
                rows.append((layer, expert, what, system, kind, group, family, change, logp, share))
    table = _rows(
        "layer expert what system kind group family change logp_change knocked_out", *rows
    )
    return table.assign(top1_intact=0.75, top1_dense=0.9, top1=0.75 + table["change"])


def _merged():
    """Two layers, in the first of which nothing merges."""
    values = {"tokens": (16, None, None), "alone": (0.4, 0.3, None), "largest": (5, 3, None),
              "part": (0.9, 0.4, 0.7), "distance": (1.5, 2.5, 1)}  # fmt: skip
    kinds = ("merged", "random", "neighbours")
    rows = [(1, q, k, v) for q, each in values.items() for k, v in zip(kinds, each, strict=True)
            if v is not None]  # fmt: skip
    first = {"tokens": 20, "alone": 1, "largest": 1}
    rows = [(0, q, k, first.get(q, NAN)) for _, q, k, _ in rows] + rows
    return _with_ends(_rows("layer quantity pairs value", *rows, merges=4), value="")


def _unseen():
    places = {(1, "expert"): 1, (1, "random patches"): 0.05,
              (3, "expert"): 0.1, (3, "random patches"): 0.05}  # fmt: skip
    changes = ((0, "sky", -0.4), (0, "wheel", 0.0), (1, "sky", 0.02), (1, "wheel", -0.1))
    rows = [(*p, e, part, scale * c) for p, scale in places.items() for e, part, c in changes]
    table = _rows("layer system expert part change", *rows)
    recall = table["part"].map({"sky": 0.9, "wheel": 0.5})
    return table.assign(
        recall_intact=recall, low=table["change"] - 0.05, high=table["change"] + 0.05
    )


def _numbers(table, change=NAN):
    """Numbers of variants with this ``kl``, and intervals."""
    table = _with_ends(table.assign(kl_change=change, retention=1 - table["kl"]), kl="kl_")
    return table.assign(kl_change_low=change - 0.02, kl_change_high=change + 0.02, reason="")


def _ablation():
    rows = [("", "", "dense", "as it is", 1e-9)]
    for recipe, direction, place in (("best", "off in turn", 0), ("paper", "on alone", 1)):
        rows.append((recipe, "", "", "as it is", KL["as it is"]))
        rows += [(recipe, p, values[place], direction, KL[p]) for p, values in PIECES.items()]
        rows.append((recipe, "router", "random routing", "control", KL["control"]))
        rows.append((recipe, "experts", "static pruning", "control", 0.05))
    rows.append(("best", "seed", "1", "another seed", 0.05))
    table = _rows("recipe piece value direction kl", *rows, macs_reduction=0.36)
    return _numbers(table, change=table["kl"] - KL["as it is"])


def sweep_table(*rows):
    """Sweeps of rows: sweep, setting, divergence, system, recipe and MACs saved."""
    table = _rows("sweep setting kl system recipe macs_reduction", *rows)
    return _numbers(table.assign(setting=pd.Series([row[1] for row in rows], dtype=object)))


SWEEPS = (
    *(("experts", n, 0.2 / n, "MoEE", "best", 0.36) for n in (1, 2, 8)),
    *(("p (paper)", p, 3 - p / 40, "MoEE", "paper", 0.5 - p / 400) for p in (50, 70, 90)),
    *(("noise (paper)", n, 0.5, "MoEE", "paper", 0.36) for n in ("reroute", "drop")),
    *(("router", n, kl, "MoEE", "", 0.36) for n, kl in (("cosine", 0.1), ("oracle", 0.2))),
    *((name, None, 0.3, "static", "best", 0.36) for name in ("experts", "router")),
    *(("p (paper)", p, 4 - p / 40, "static", "best", 0.4 - p / 400) for p in (50, 70, 90)),
)


TABLES = {
    "accuracy": _with_ends(_rows(
        "system top1 retention agreement kl",
        ("dense", 0.9, 1.0, 1.0, 0.0), ("MoEE", 0.45, 0.5, 0.6, 0.3), ("random", 0.09, 0.1, 0.1, 2),
        reference_top1=0.9, n_images=500,
    ), top1="", retention="retention_"),
    "layers": _rows(
        "index converted experts noise_share active_fraction union_fraction",
        (0, False, 0, NAN, NAN, NAN), (1, True, 4, 0.2, 0.5, 0.9), (2, True, 7, 0.4, 0.25, 0.8),
    ),
    "sizes": _rows(
        "layer expert fraction active union share",
        (3, 0, 0.2, 0.3, 0.8, 0.4), (3, 1, 0.5, 0.3, 0.8, 0.6), (4, 0, 0.4, 0.4, 1.0, 1.0),
        system="MoEE",
    ),
    "neurons": _kept((3, 0, "xx.."), (3, 1, "x..."), (5, 0, "xxxx")),
    "overlap": _pairs("jaccard expected_jaccard", (3, 0, 1, 0.5, 0.2), (4, 0, 1, 0.1, 0.3)),
    "embedding": _rows(
        "layer x y cluster", (3, 0, 0, 0), (3, 1, 0, -1), (5, 2.0, 0, 0), (5, 4.0, 1, 1)
    ),
    "surrogate": _rows(
        "data clusters noise_share", ("activations", 12, 0.2), ("surrogate", 2, 0.75), layer=3
    ),
    "macs": _rows(
        "component layer converted macs_dense macs params_dense params"
        " macs_unread macs_unread_dense",
        ("mlps.0", 0, True, 3e8, 1e8, 2e6, 2e6, 0, 0),
        ("mlps.1", 1, False, 3e8, 3e8, 2e6, 2e6, 5e7, 1e8),
        ("total", -1, True, 1e9, 8e8, 5e6, 5.05e6, 5e7, 1e8),
    ),
    "routing": _rows(
        "system layer rank share n_experts k",
        ("MoEE", 0, 1, 0.3, 2, 1), ("MoEE", 0, 0, 0.7, 2, 1), ("MoEE", 1, 0, 1.0, 1, 1),
        ("random centres", 0, 0, 0.6, 2, 2), ("random centres", 0, 1, 0.4, 2, 2),
        ("random centres", 1, 0, 0.5, 2, 2), ("random centres", 1, 1, 0.5, 2, 2), n_images=24,
    ),
    "balance": _with_ends(_rows(
        "system layer metric value n_experts",
        ("MoEE", 0, "gini", 0.2, 4), ("MoEE", 1, "gini", 0.4, 4), ("MoEE", 0, "entropy", 0.9, 4),
        ("random centres", 0, "gini", 0.3, 7), ("random centres", 1, "gini", 0.3, 7),
        k=1, n_images=24,
    ), value=""),
    "class_routing": _rows(
        "layer class_name expert share share_all",
        (3, "pug", 0, 0.3, 0.2), (3, "pug", 1, 0.7, 0.8), (3, "plane", 0, 0.2, 0.2),
        (3, "plane", 1, 0.8, 0.8), (9, "pug", 0, 0.2, 0.6), (9, "pug", 1, 0.8, 0.4),
        (9, "plane", 0, 0.1, 0.6), (9, "plane", 1, 0.9, 0.4), system="MoEE",
    ),
    "specificity": _with_ends(_rows(
        "layer class_index class_name js corrected null_high",
        (0, -1, "all", 0.02, 0.01, 0.03), (5, -1, "all", 0.3, 0.25, 0.04),
        (0, 0, "pug", 0.1, 0.1, 0.1), (5, 0, "pug", 0.9, 0.8, 0.1),
        (0, 1, "cat", 0.3, 0.1, 0.1), (5, 1, "cat", 0.2, 0.2, 0.1), system="MoEE",
    ), corrected=""),
    "class_information": _with_ends(
        _rows("layer corrected p", (0, 0.01, 0.3), (5, 0.123, 0.01), system="MoEE"), corrected=""
    ),
    "class_distance": _classes(),
    "class_relatedness": _rows(
        "layer spearman null_high", (0, -0.1, 0.2), (1, 0.4, 0.2), system="MoEE"
    ),
    "modularity": _with_ends(_rows(
        "layer ami class_null_high null_high", (0, 0.2, 0.1, 0.05), (1, 0.4, 0.1, 0.05),
        system="MoEE",
    ), ami=""),
    "part_profile": _rows(
        "expert order part share share_all size", (0, 1, "sky", 0.9, 0.4, 0.1),
        (1, 0, "wheel", 0.5, 0.2, 0.3), (1, 0, "sky", 0.5, 0.4, 0.3), system="MoEE", layer=3,
    ),
    "parts_unseen": _unseen(),
    "knock_out": _knocked_out(),
    "class_knock_out": _knocked_out(),
    "use_and_need": _rows(
        "system layer spearman top_match",
        ("expert", 0, 0.5, 0.4), ("expert", 4, 0.05, 0.2), ("random tokens", 0, 0.3, 0.3),
        ("random tokens", 4, 0.2, 0.1), null_high=0.1, top_match_null_high=0.2,
    ),
    "similarity": _pairs(
        "cosine cosine_centred", (5, 0, 1, 0.9, -0.5), (5, 0, 2, 0.5, 0.1), (5, 1, 2, 0.6, 0.0)
    ),
    "similarity_summary": _rows(
        "layer min mean max centred_min centred_mean centred_max centred_expected"
        " common_mean near_orthogonal centred_near_orthogonal",
        (0, 0.1, 0.5, 0.9, -0.5, -0.1, 0.3, -0.2, 0.6, 0.0, 0.7),
        (1, 0.0, 0.2, 0.6, -0.4, -0.1, 0.2, -0.2, 0.3, 0.4, 0.8), system="MoEE",
    ),
    "ablation": pd.concat([_ablation(), sweep_table(*SWEEPS)], ignore_index=True),
    "router_regret": _rows(
        "layer router error regret best",
        (0, "centre", 0.02, 0.01, 0.6), (1, "centre", 0.04, 0.01, 0.5), (0, "oracle", 0.01, 0, 1),
        (1, "oracle", 0.01, 0, 1),
    ),
    "architectures": _rows(
        "model layer depth quantity value chance",
        ("ViT", 0, 0.2, "experts", 4, NAN), ("ViT", 1, 0.8, "experts", 9, NAN),
        ("Swin", 0, 0.5, "experts", 7, NAN), ("ViT", 0, 0.2, "class", 0.01, 0.002),
        ("ViT", 1, 0.8, "class", 0.2, 0.003), ("ViT", 0, 0.2, "similarity", 0.9, NAN),
    ),
    "architecture_variants": _with_ends(_rows(
        "variant retention kl",
        ("dense", 1.0, 0), ("best", 0.99, 0.1), ("best, random routing", 0.8, 1), model="ViT",
    ), retention="retention_", kl="kl_"),
    "fine_tuning": _with_ends(_rows(
        "budget stage seed retention mean macs_reduction",
        (0, "before", 0, 0.99, 0.99, 0.28), (1, "before", 0, 0.9, 0.9, 0.45),
        (0, "after", 0, 0.99, 1.0, 0.28), (0, "after", 1, 1.01, 1.0, 0.28),
        (1, "after", 0, 0.94, 0.95, 0.45), (1, "after", 1, 0.96, 0.95, 0.45), system="MoEE",
    ), mean=""),
    "history": _rows(
        "epoch loss kl agreement", (0, NAN, 0.5, 0.8), (1, 0.4, 0.2, 0.9), (2, 0.3, 0.3, 0.88)
    ),
    "comparison": _with_ends(_rows(
        "system family macs_asked seed mean macs_reduction reduces_macs random_routing"
        " constant_routing oracle_routing static_pruning",
        ("MoEE, best", "MoEE", 0.28, 0, 0.98, 0.28, True, 0.8, 0.7, 1.0, 0.9),
        ("MoEE, best", "MoEE", 0.28, 1, 0.98, 0.30, True, 0.8, 0.7, 1.0, 0.9),
        ("MoEE, paper", "MoEE", 0.28, 0, 0.85, 0.28, True, 0.9, 0.5, NAN, 0.9),
        ("static: pruned", "static pruning", 0.28, 0, 0.9, 0.28, True, NAN, NAN, NAN, 0.9),
        ("sparse", "Upcycling", 0.28, 0, 1.0, -0.01, False, NAN, NAN, NAN, 0.9),
        ("MoEE, best", "MoEE", 0.36, 0, 0.78, 0.36, True, 0.5, 0.4, 0.8, 0.6),
        ("MoEE, unmade", "MoEE", 0.36, 0, NAN, NAN, False, NAN, NAN, NAN, 0.6),
    ), mean=""),
    "merging": _merged(),
    "trade_off": _rows(
        "system macs_asked macs_reduction kl retention",
        ("ToMe", 0.36, 0.365, 0.04, 0.98), ("all three", 0.36, 0.36, 0.01, 1.0),
        ("ToMe", 0.5, 0.51, 0.2, 0.9), ("all three", 0.5, 0.5, 0.04, 0.97),
    ),
    "learning_curves": _rows(
        "start images seed mean low high",
        ("a", 0, 0, 0.1, 0.0, 0.2), ("a", 64, 0, 0.6, 0.5, 0.7), ("a", 64, 1, 0.6, 0.5, 0.7),
        ("b", 0, 0, 0.1, 0.0, 0.2), ("b", 64, 0, 0.4, 0.3, 0.5),
    ),
    "learned": _rows(
        "start top1 low high worst best images images_low images_high",
        ("a", 0.6, 0.5, 0.7, 0.58, 0.62, 30.0, 20.0, 40.0),
        ("b", 0.4, 0.3, 0.5, 0.39, 0.41, NAN, 35.0, INF),
        ("c", 0.5, 0.3, 0.6, 0.39, 0.55, 40.0, 35.0, INF), level=0.5,
    ),
    "which_beats_which": _starts(),
    "contributions": _rows(
        "layer group seed contribution relative",
        (6, "core", 0, 1.0, 0.5), (6, "core", 1, 3.0, 0.5), (7, "core", 0, 4.0, 0.6),
        (6, "universal", 0, 0.5, 0.1), (7, "universal", 0, 0.5, 0.2),
    ),
}  # fmt: skip
TABLES["routing_controls"] = TABLES["comparison"]
for _table in TABLES.values():
    _table.attrs["caption"] = CAPTION


@cache
def figure_of(name):
    """The figure of the table of that name; only to be read."""
    return getattr(plots, name)(TABLES[name])


def panel(fig, title):
    """The axes under a title that begins so."""
    (found,) = [ax for ax in fig.axes if ax.get_title(loc="left").startswith(title)]
    return found


def titles(axes):
    return [ax.get_title(loc="left") for ax in axes]


def words(texts):
    return [text.get_text() for text in texts]


def legend(shown):
    """Names in the legends of a figure, or of axes."""
    legends = shown.legends if hasattr(shown, "legends") else [shown.get_legend()]
    return [name for one in legends for name in words(one.get_texts())]


def lines(ax):
    """Points of every line that has some."""
    return [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata())]


def shown_in(fig):
    """All that a figure shows, panel by panel, in JSON's types: words, places and colours."""
    around = [fig.get_supxlabel(), fig.get_supylabel(), *(legend(fig) if fig.legends else [])]
    panels = [ax for ax in fig.axes if not hasattr(ax, "_colorbar")]
    bars = [ax.get_ylabel() for ax in fig.axes if hasattr(ax, "_colorbar")]
    caption = " ".join(fig.texts[-1].get_text().split())
    return _shorten([[*around, *bars, caption], *map(_shown_on, panels)])


def _shown_on(ax):
    named = [axis for axis in (ax.xaxis, ax.yaxis)
             if isinstance(axis.get_major_locator(), FixedLocator)]  # fmt: skip
    facts = {
        "title": ax.get_title(loc="left"),
        "labels": [ax.get_xlabel(), ax.get_ylabel()],
        "limits": [*ax.get_xlim(), *ax.get_ylim()],
        "names": [words(axis.get_ticklabels()) for axis in named],
        "texts": [[text.get_text(), str(text.get_weight())] for text in ax.texts],
        "legend": legend(ax) if ax.get_legend() else [],
        "lines": [
            [line.get_color(), line.get_markerfacecolor(), line.get_linestyle(),
             str(line.get_marker()), line.get_linewidth(), line.get_xydata()]
            for line in ax.lines if len(line.get_xdata())
        ],
        "bars": [
            [*bar.get_bbox().bounds, to_hex(bar.get_facecolor(), keep_alpha=True), bar.get_hatch()]
            for bar in ax.patches if isinstance(bar, Rectangle)
        ],
        "steps": [patch.get_data()[:2] for patch in ax.patches if isinstance(patch, StepPatch)],
        "intervals": [c.get_segments() for c in ax.collections if isinstance(c, LineCollection)],
        "cells": [c.get_array() for c in ax.collections if isinstance(c, QuadMesh)],
        "dots": [
            [dots.get_offsets(), dots.get_sizes(), list(map(to_hex, dots.get_facecolor()))]
            for dots in ax.collections if isinstance(dots, PathCollection)
        ],
        "bands": [
            [path.get_extents().bounds for path in c.get_paths()]
            for c in ax.collections if isinstance(c, PolyCollection)
        ],
    }  # fmt: skip
    return {name: fact for name, fact in facts.items() if len(fact) and fact != ["", ""]}


def _shorten(value):
    if isinstance(value, dict):
        return {name: _shorten(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_shorten(each) for each in getattr(value, "tolist", lambda: value)()]
    return float(f"{value:.5g}") if isinstance(value, float) else value


if __name__ == "__main__":  # writes anew what the test of every plot compares with
    parts = {
        name: map(partial(json.dumps, ensure_ascii=False), shown_in(figure_of(name)))
        for name in TABLES
    }
    texts = [f'"{name}": [\n  ' + ",\n  ".join(each) + "\n]" for name, each in parts.items()]
    place = Path(__file__).parents[1] / "plots" / "figures.json"
    place.write_text("{\n" + ",\n".join(texts) + "\n}\n", encoding="utf-8")
