"""A small table for every plot, with numbers whose figure and sentence are known."""

from __future__ import annotations

import math
from functools import cache

import pandas as pd
from matplotlib.figure import Figure

from moee_analysis import plots

NAN, INF = math.nan, math.inf
CAPTION = "A made-up table; 95 % intervals of nothing."


def _rows(columns: str, *rows: tuple) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=columns.split())


def _with_ends(table: pd.DataFrame, *values: str) -> pd.DataFrame:
    """``value_low`` and ``value_high`` of each of ``values``, a fifth off; of one, ``low``."""
    prefixes = [""] if len(values) == 1 else [f"{value}_" for value in values]
    for value, prefix in zip(values, prefixes, strict=True):
        table = table.assign(
            **{f"{prefix}low": 0.8 * table[value], f"{prefix}high": 1.2 * table[value]}
        )
    return table


def _kept(*experts: tuple[str, int, int, str]) -> pd.DataFrame:
    """Neurons of experts as text: ``x`` is kept, ``.`` is not."""
    return pd.DataFrame(
        {"system": system, "layer": layer, "expert": expert, "neuron": n, "order": n,
         "kept": mark == "x"}
        for system, layer, expert, marks in experts
        for n, mark in enumerate(marks)
    )  # fmt: skip


def _pairs(columns: str, *rows: tuple) -> pd.DataFrame:
    """Pairs a < b of all experts of a layer, the other way round too, and each with itself."""
    table = _rows(f"system layer expert_a expert_b {columns}", *rows)
    other = table.rename(columns={"expert_a": "expert_b", "expert_b": "expert_a"})
    both = pd.concat([table, other])
    itself = both.drop_duplicates(["layer", "expert_a"]).copy()
    itself["expert_b"] = itself["expert_a"]
    itself[columns.split()] = 1.0
    table = pd.concat([both, itself], ignore_index=True)
    return table.assign(order_a=table["expert_a"], order_b=table["expert_b"])


def _classes() -> pd.DataFrame:
    names, families = ("pug", "cliff", "cat"), ("animal", "scenery", "animal")
    order, js = (0, 2, 1), {(0, 1): (0.6, 0.02), (0, 2): (0.05, 0.01), (1, 2): (0.4, 0.03)}
    rows = [(a, b, *js.get((min(a, b), max(a, b)), (0.0, 0.0))) for a in range(3) for b in range(3)]
    return pd.DataFrame(
        {"system": "MoEE", "layer": 3, "class_index_a": a, "class_index_b": b,
         "class_a": names[a], "class_b": names[b], "order_a": order[a], "order_b": order[b],
         "family_a": families[a], "family_b": families[b], "js": distance, "floor": floor}
        for a, b, distance, floor in rows
    )  # fmt: skip


def _starts() -> pd.DataFrame:
    lead = {("a", "b"): 0.2, ("a", "c"): 0.05, ("b", "c"): -0.15}
    lead |= {(b, a): -value for (a, b), value in lead.items()} | {(a, a): 0.0 for a in "abc"}
    half = {frozenset("ab"): 0.1, frozenset("ac"): 0.1, frozenset("bc"): 0.2}
    rows = [(a, b, lead[a, b], half.get(frozenset((a, b)), 0.0)) for a in "abc" for b in "abc"]
    return pd.DataFrame(
        {"start_a": a, "start_b": b, "order_a": "abc".index(a), "order_b": "abc".index(b),
         "difference": value, "low": value - width, "high": value + width,
         "beats": value - width > 0}
        for a, b, value, width in rows
    )  # fmt: skip


def _knocked_out() -> pd.DataFrame:
    """Two layers of two and three experts; three classes of two families."""
    rows, groups = [], {"red_one": "warm", "green": "cold", "blue": "warm"}
    for layer, expert in ((0, 0), (0, 1), (4, 0), (4, 1), (4, 2)):
        for what, system in (("removed", "expert"), ("removed", "random tokens"),
                             ("alone", "expert"), ("alone", "random tokens")):  # fmt: skip
            change = (-0.02 if what == "removed" else -0.4) * (expert + 1 + (layer == 4))
            change /= 1 + (system == "random tokens")
            common = {"layer": layer, "expert": expert, "what": what, "system": system,
                      "top1_intact": 0.75, "top1_dense": 0.9}  # fmt: skip
            rows.append(
                common
                | {
                    "kind": "all",
                    "group": "all",
                    "family": "",
                    "change": change,
                    "top1": 0.75 + change,
                    "logp_change": NAN,
                    "knocked_out": 0.4,
                }
            )
            for place, (group, family) in enumerate(groups.items()):
                share = 0.1 * (1 + expert) + 0.05 * place
                rows.append(
                    common
                    | {
                        "kind": "class",
                        "group": group,
                        "family": family,
                        "change": change,
                        "top1": 0.75 + change,
                        "logp_change": change * (1 + place),
                        "knocked_out": share,
                    }
                )
    return pd.DataFrame(rows)


def _unseen() -> pd.DataFrame:
    changes = {(0, "sky"): -0.4, (0, "wheel"): 0.0, (1, "sky"): 0.02, (1, "wheel"): -0.1}
    return pd.DataFrame(
        {"layer": layer, "system": system, "expert": expert, "part": part,
         "recall_intact": {"sky": 0.9, "wheel": 0.5}[part], "change": change * scale,
         "low": change * scale - 0.05, "high": change * scale + 0.05}
        for layer in (1, 3)
        for system, scale in (("expert", 1 if layer == 1 else 0.1), ("random patches", 0.05))
        for (expert, part), change in changes.items()
    )  # fmt: skip


TABLES = {
    "accuracy": _with_ends(_rows(
        "system top1 retention agreement kl reference_top1 n_images",
        ("dense", 0.9, 1.0, 1.0, 0.0, 0.9, 500), ("MoEE", 0.45, 0.5, 0.6, 0.3, 0.9, 500),
        ("random", 0.09, 0.1, 0.1, 2, 0.9, 500),
    ), "retention", "top1").rename(columns={"top1_low": "low", "top1_high": "high"}),
    "layers": _rows(
        "index converted experts noise_share active_fraction union_fraction",
        (0, False, 0, NAN, NAN, NAN), (1, True, 4, 0.2, 0.5, 0.9), (2, True, 7, 0.4, 0.25, 0.8),
    ),
    "sizes": _rows(
        "system layer expert fraction active union share",
        ("MoEE", 3, 0, 0.2, 0.3, 0.8, 0.4), ("MoEE", 3, 1, 0.5, 0.3, 0.8, 0.6),
        ("MoEE", 4, 0, 0.4, 0.4, 1.0, 1.0),
    ),
    "neurons": _kept(("MoEE", 3, 0, "xx.."), ("MoEE", 3, 1, "x..."), ("MoEE", 5, 0, "xxxx")),
    "overlap": _pairs(
        "jaccard expected_jaccard", ("MoEE", 3, 0, 1, 0.5, 0.2), ("MoEE", 4, 0, 1, 0.1, 0.3)
    ),
    "embedding": _rows(
        "layer x y cluster", (3, 0, 0, 0), (3, 1, 0, -1), (5, 2.0, 0, 0), (5, 4.0, 1, 1)
    ),
    "surrogate": _rows(
        "layer data clusters noise_share",
        (3, "activations", 12, 0.2), (3, "surrogate", 2, 0.75),
    ),
    "macs": _rows(
        "component layer converted macs_dense macs params_dense params"
        " macs_unread macs_unread_dense",
        ("mlps.0", 0, True, 3e8, 1e8, 2e6, 2e6, 0, 0),
        ("mlps.1", 1, False, 3e8, 3e8, 2e6, 2e6, 5e7, 1e8),
        ("total", -1, True, 1e9, 8e8, 5e6, 5.05e6, 5e7, 1e8),
    ),
    "routing": _rows(
        "system layer rank share n_experts k n_images",
        ("MoEE", 0, 1, 0.3, 2, 1, 24), ("MoEE", 0, 0, 0.7, 2, 1, 24), ("MoEE", 1, 0, 1.0, 1, 1, 24),
        ("random centres", 0, 0, 0.6, 2, 2, 24), ("random centres", 0, 1, 0.4, 2, 2, 24),
        ("random centres", 1, 0, 0.5, 2, 2, 24), ("random centres", 1, 1, 0.5, 2, 2, 24),
    ),
    "balance": _with_ends(_rows(
        "system layer metric value n_experts k n_images",
        ("MoEE", 0, "gini", 0.2, 4, 1, 24), ("MoEE", 1, "gini", 0.4, 4, 1, 24),
        ("MoEE", 0, "entropy", 0.9, 4, 1, 24), ("random centres", 0, "gini", 0.3, 7, 1, 24),
        ("random centres", 1, "gini", 0.3, 7, 1, 24),
    ), "value"),
    "class_routing": _rows(
        "system layer class_name expert share share_all",
        ("MoEE", 3, "pug", 0, 0.3, 0.2), ("MoEE", 3, "pug", 1, 0.7, 0.8),
        ("MoEE", 3, "plane", 0, 0.2, 0.2), ("MoEE", 3, "plane", 1, 0.8, 0.8),
        ("MoEE", 9, "pug", 0, 0.2, 0.6), ("MoEE", 9, "pug", 1, 0.8, 0.4),
        ("MoEE", 9, "plane", 0, 0.1, 0.6), ("MoEE", 9, "plane", 1, 0.9, 0.4),
    ),
    "specificity": _with_ends(_rows(
        "system layer class_index class_name js corrected null_high",
        ("MoEE", 0, -1, "all", 0.02, 0.01, 0.03), ("MoEE", 5, -1, "all", 0.3, 0.25, 0.04),
        ("MoEE", 0, 0, "pug", 0.1, 0.1, 0.1), ("MoEE", 5, 0, "pug", 0.9, 0.8, 0.1),
        ("MoEE", 0, 1, "cat", 0.3, 0.1, 0.1), ("MoEE", 5, 1, "cat", 0.2, 0.2, 0.1),
    ), "corrected"),
    "class_information": _with_ends(_rows(
        "system layer corrected p", ("MoEE", 0, 0.01, 0.3), ("MoEE", 5, 0.123, 0.01)
    ), "corrected"),
    "class_distance": _classes(),
    "class_relatedness": _rows(
        "system layer spearman null_high", ("MoEE", 0, -0.1, 0.2), ("MoEE", 1, 0.4, 0.2)
    ),
    "modularity": _with_ends(_rows(
        "system layer ami class_null_high null_high",
        ("MoEE", 0, 0.2, 0.1, 0.05), ("MoEE", 1, 0.4, 0.1, 0.05),
    ), "ami"),
    "part_profile": _rows(
        "system layer expert order part share share_all size",
        ("MoEE", 3, 0, 1, "sky", 0.9, 0.4, 0.1), ("MoEE", 3, 1, 0, "wheel", 0.5, 0.2, 0.3),
        ("MoEE", 3, 1, 0, "sky", 0.5, 0.4, 0.3),
    ),
    "parts_unseen": _unseen(),
    "knock_out": _knocked_out(),
    "class_knock_out": _knocked_out(),
    "use_and_need": _rows(
        "system layer spearman null_high top_match top_match_null_high",
        ("expert", 0, 0.5, 0.1, 0.4, 0.2), ("expert", 4, 0.05, 0.1, 0.2, 0.2),
        ("random tokens", 0, 0.3, 0.1, 0.3, 0.2), ("random tokens", 4, 0.2, 0.1, 0.1, 0.2),
    ),
    "similarity": _pairs(
        "cosine cosine_centred", ("MoEE", 5, 0, 1, 0.9, -0.5), ("MoEE", 5, 0, 2, 0.5, 0.1),
        ("MoEE", 5, 1, 2, 0.6, 0.0),
    ),
    "similarity_summary": _rows(
        "system layer min mean max centred_min centred_mean centred_max centred_expected"
        " common_mean near_orthogonal centred_near_orthogonal",
        ("MoEE", 0, 0.1, 0.5, 0.9, -0.5, -0.1, 0.3, -0.2, 0.6, 0.0, 0.7),
        ("MoEE", 1, 0.0, 0.2, 0.6, -0.4, -0.1, 0.2, -0.2, 0.3, 0.4, 0.8),
    ),
    "ablation": _with_ends(_rows(
        "recipe piece value direction kl kl_change retention",
        ("", "", "dense", "as it is", 0.0, NAN, 1.0),
        ("best", "", "", "as it is", 0.01, NAN, 0.99),
        ("best", "refit", "none", "off in turn", 0.5, 0.49, 0.6),
        ("best", "order", "a", "off in turn", 0.2, 0.19, 0.8),
        ("best", "", "random routing", "control", 0.9, 0.89, 0.3),
        ("paper", "", "", "as it is", 0.6, NAN, 0.5),
        ("paper", "refit", "shared", "on alone", 0.1, -0.5, 0.9),
        ("paper", "order", "b", "on alone", NAN, NAN, NAN),
    ), "kl", "kl_change"),
    "sweeps": _with_ends(_rows(
        "system sweep setting recipe kl kl_change macs_reduction",
        ("MoEE", "experts", 4, "best", 0.2, 0, 0.28), ("MoEE", "experts", 8, "best", 0.1, 0, 0.28),
        ("static", "experts", 4, "best", 0.05, 0, 0.28),
    ), "kl", "kl_change"),
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
        "model variant retention kl",
        ("ViT", "dense", 1.0, 0), ("ViT", "best", 0.99, 0.1),
        ("ViT", "best, random routing", 0.8, 1),
    ), "retention", "kl"),
    "fine_tuning": _with_ends(_rows(
        "system budget stage seed retention mean macs_reduction",
        ("MoEE", 0, "before", 0, 0.99, 0.99, 0.28), ("MoEE", 1, "before", 0, 0.9, 0.9, 0.45),
        ("MoEE", 0, "after", 0, 0.99, 1.0, 0.28), ("MoEE", 0, "after", 1, 1.01, 1.0, 0.28),
        ("MoEE", 1, "after", 0, 0.94, 0.95, 0.45), ("MoEE", 1, "after", 1, 0.96, 0.95, 0.45),
    ), "mean"),
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
    ), "mean"),
    "learning_curves": _rows(
        "start images seed mean low high",
        ("a", 0, 0, 0.1, 0.0, 0.2), ("a", 64, 0, 0.6, 0.5, 0.7), ("a", 64, 1, 0.6, 0.5, 0.7),
        ("b", 0, 0, 0.1, 0.0, 0.2), ("b", 64, 0, 0.4, 0.3, 0.5),
    ),
    "learned": _rows(
        "start top1 low high worst best level images images_low images_high",
        ("a", 0.6, 0.5, 0.7, 0.58, 0.62, 0.5, 30.0, 20.0, 40.0),
        ("b", 0.4, 0.3, 0.5, 0.39, 0.41, 0.5, NAN, 35.0, INF),
        ("c", 0.5, 0.3, 0.6, 0.39, 0.55, 0.5, 40.0, 35.0, INF),
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
def figure_of(name: str) -> Figure:
    """The figure of the table of that name; only to be read."""
    return getattr(plots, name)(TABLES[name])


def panel(fig: Figure, title: str):
    """The axes under a title that begins so."""
    (found,) = [ax for ax in fig.axes if ax.get_title(loc="left").startswith(title)]
    return found


def legend(fig: Figure) -> list[str]:
    return [text.get_text() for one in fig.legends for text in one.get_texts()]


def lines(ax) -> list[list[list[float]]]:
    """Points of every line that has some."""
    return [line.get_xydata().tolist() for line in ax.lines if len(line.get_xdata())]
