"""What the experts are made of: their sizes, their neurons, and how alike they are."""

from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from moee_analysis.plots import drawing, style, text

_CENTRED, _RAW, _COMMON = style.PALETTE[:3]
_COSINES = (("", "raw", _RAW, -0.1), ("centred_", "centred", _CENTRED, 0.1))
_SHARES = (
    ("common_mean", _COMMON, "‖mean‖² / mean ‖centre‖²"),
    ("near_orthogonal", _RAW, "raw pairs, |cos| < 0.2"),
    ("centred_near_orthogonal", _CENTRED, "centred pairs, |cos| < 0.2"),
)
_SIZES = ("kept by any expert", "an expert (area: share of tokens)", "used by a token on average")


def _tell_layers(table: pd.DataFrame) -> str:
    converted = table[table["converted"]].rename(columns={"index": "layer"})
    first = f"{len(converted)} of {len(table)} layers have clusters"
    if converted.empty:
        return f"{first}: all stay dense."
    return (
        f"{first}: {text.course(converted, 'experts', text.whole)}. Noise among the clustered "
        f"tokens: {text.course(converted, 'noise_share', text.percent)}. Hidden neurons that a "
        f"token uses: {text.course(converted, 'active_fraction', text.percent)}."
    )


@drawing.plot(_tell_layers)
def layers(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.layers``: experts (a cross: stayed dense), noise, neurons left."""
    fig, (left, middle, right) = style.figure(8.4, 2.4, 1, 3, sharex=True)
    x, dense = table["index"], table.loc[~table["converted"], "index"]
    left.bar(x, table["experts"], color=style.PALETTE[0])
    left.plot(dense, np.zeros(len(dense)), "x", color=style.INK, ms=6, mew=1)
    left.set(ylabel="experts", title="clusters that became experts")
    middle.bar(x, table["noise_share"], color=style.GREY)
    middle.set(ylabel="share of clustered tokens", title="noise", ylim=(0, 1))
    right.bar(x, table["union_fraction"], color=style.GREY, label="stored")
    right.bar(x, table["active_fraction"], color=style.PALETTE[2], label="active")
    right.set(ylabel="share of hidden neurons", title="neurons left", ylim=(0, 1))
    return drawing.finish(fig, table, caption, right, layers=(left, middle, right))


def _tell_embedding(table: pd.DataFrame) -> str:
    words = []
    for layer, tokens in table.groupby("layer"):
        clusters = tokens.loc[tokens["cluster"] >= 0, "cluster"].nunique()
        noise = text.percent((tokens["cluster"] < 0).mean())
        words.append(f"{text.count(clusters, 'cluster')} in layer {layer} ({noise} in none)")
    return f"The tokens fall into {text.listed(words)}." if words else "No layer is shown."


@drawing.plot(_tell_embedding)
def embedding(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.embedding``: tokens by cluster, noise (-1) grey, by layer."""
    layers = table.groupby("layer")
    fig, axes = style.panels(len(layers), cols=3, size=(2.6, 2.6))
    for ax, (layer, tokens) in zip(axes, layers, strict=True):
        colours = style.expert_colours(tokens["cluster"].max() + 1)
        palette = dict(enumerate(colours)) | {-1: style.PALE}
        look = {"palette": palette, "s": float(np.clip(6000 / len(tokens), 0.6, 8)), "lw": 0}
        ordered = tokens.sort_values("cluster", kind="stable")  # noise below
        given = {"x": "x", "y": "y", "hue": "cluster", "rasterized": True, "legend": False}
        sns.scatterplot(ordered, ax=ax, **given, **look)
        clusters = tokens[tokens["cluster"] >= 0].groupby("cluster")[["x", "y"]]
        for cluster, places in clusters:
            drawing.number(ax, *places.median(), str(cluster))
        noise = (tokens["cluster"] < 0).mean()
        title = f"layer {layer}: {len(clusters)} clusters, {noise:.0%} noise"
        ax.set(xlabel="", ylabel="", title=title)
        drawing.bare(ax)
    return drawing.finish(fig, table, caption)


def _tell_surrogate(table: pd.DataFrame) -> str:
    words = []
    for layer, rows in table.groupby("layer"):
        real, invented = (rows.set_index("data").loc[name] for name in ("activations", "surrogate"))
        words.append(
            f"layer {layer}: {real['clusters']:.0f} clusters and "
            f"{text.percent(real['noise_share'])} noise in the activations, "
            f"{invented['clusters']:.0f} and {text.percent(invented['noise_share'])} in a "
            "surrogate that has no clusters by construction"
        )
    return text.sentence("; ".join(words) or "no layer is shown")


@drawing.plot(_tell_surrogate)
def surrogate(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.surrogate``: clusters found, and clusters invented, per layer."""
    fig, axes = style.figure(6.4, 2.5, 1, 2)
    labels = {"clusters": "clusters found", "noise_share": "share of noise"}
    look = {"x": "layer", "hue": "data", "palette": style.colours(table["data"]), "errorbar": None}
    for ax, (value, label) in zip(axes, labels.items(), strict=True):
        sns.barplot(table, y=value, saturation=1, ax=ax, **look)
        ax.get_legend().remove()
        ax.set(xlabel="", ylabel=label)
    return drawing.finish(fig, table, caption, axes[0], x=style.LAYER_AXIS)


def _tell_sizes(rows: pd.DataFrame) -> str:
    return (
        f"experts keep {text.span(rows['fraction'], text.percent)}, a token uses on average "
        f"{text.course(rows, 'active', text.percent)}, and "
        f"{text.span(rows['union'], text.percent)} are stored"
    )


@drawing.plot(_tell_sizes, "Of a layer's hidden neurons")
def sizes(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.sizes``: a dot per expert, its area its share of the tokens."""
    colours = style.colours(table["system"])
    fig, axes = style.panels(len(colours), cols=1, size=(6.2, 2.7), sharex=True, sharey=True)
    for ax, (system, colour) in zip(axes, colours.items(), strict=True):
        experts = table[table["system"] == system]
        layers, by_layer = experts.drop_duplicates("layer"), experts.groupby("layer")
        count = by_layer["expert"].transform("size")
        x = experts["layer"] + (by_layer.cumcount() + 0.5) / count * 0.6 - 0.3  # dots keep apart
        dots = {"s": 4 + 320 * experts["share"], "color": colour, "alpha": 0.65, "lw": 0}
        ax.bar(layers["layer"], layers["union"], 0.7, color=style.FAINT, label=_SIZES[0])
        ax.scatter(x, experts["fraction"], label=_SIZES[1], **dots)
        ends = layers["layer"] - 0.35, layers["layer"] + 0.35
        ax.hlines(layers["active"], *ends, color=style.INK, lw=1.8, label=_SIZES[2])
        ax.grid(visible=False, axis="x")
        ax.set(title=system, ylim=(0, 1.03))
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    return drawing.finish(fig, table, caption, axes[0], layers=axes, y="hidden neurons kept")


def _tell_neurons(table: pd.DataFrame) -> str:
    words = []
    for part in drawing.by_layer(table).values():
        by_expert = text.span(part.groupby("expert")["kept"].mean(), text.percent)
        unused = text.percent(1 - part.groupby("neuron")["kept"].any().mean())
        where = text.where(part.iloc[0], table)
        words.append(f"{by_expert} in {where} ({unused} are kept by none)")
    return f"Of the hidden neurons an expert keeps {'; '.join(words)}."


@drawing.plot(_tell_neurons)
def neurons(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.neurons``: experts by neurons, those kept by most left, by none right."""
    parts = drawing.by_layer(table)
    heights = [0.4 + 0.11 * part["expert"].nunique() for part in parts.values()]
    rows = {"squeeze": False, "height_ratios": heights}
    fig, axes = style.figure(7.0, sum(heights) + 0.4, len(parts), 1, **rows)
    look = {"cmap": ListedColormap([style.FAINT, style.PALETTE[0]]), "vmin": 0, "vmax": 1}
    for ax, (title, part) in zip(axes[:, 0], parts.items(), strict=True):
        kept = part.pivot(index="expert", columns="order", values="kept").astype(float)
        drawing.heat_map(ax, kept, most=8, xticklabels=False, **look)
        drawing.part_groups(kept.index, ax.axhline, color="white", lw=0.7)
        ax.set(title=f"{title}: {kept.shape[1]} hidden neurons", ylabel="expert")
    axes[-1, 0].set_xlabel("hidden neuron, kept by most experts first")
    return drawing.finish(fig, table, caption)


def _tell_overlap(table: pd.DataFrame) -> str:
    pairs = table[table["expert_a"] < table["expert_b"]]
    if pairs.empty:
        return "No layer has two experts to compare."
    ahead = (pairs["jaccard"] > pairs["expected_jaccard"]).sum()
    return (
        f"The Jaccard index of two experts' neurons is {text.course(pairs, 'jaccard')}; random "
        f"subsets of their sizes would have {text.span(pairs['expected_jaccard'])}. {ahead} of "
        f"{len(pairs)} pairs share more than that."
    )


@drawing.plot(_tell_overlap)
def overlap(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.overlap``: Jaccard indices above the diagonal, below of random subsets."""
    above = table["expert_a"] < table["expert_b"]
    shown = table["jaccard"].where(above, table["expected_jaccard"])
    shown = table.assign(shown=shown.mask(table["expert_a"] == table["expert_b"]))
    pairs = {"index": "expert_a", "columns": "expert_b", "values": "shown"}
    maps = {title: part.pivot(**pairs) for title, part in drawing.by_layer(shown).items()}
    fig = _draw_pairs(maps, "Jaccard: ◥ found, ◣ random", cmap=style.SHARES, vmin=0)
    return drawing.finish(fig, table, caption, x="expert", y="expert")


def _draw_pairs(maps: dict[str, pd.DataFrame], bar: str, **look: Any) -> Figure:
    panel = (2.0, 2.15 + 0.25 * any("\n" in title for title in maps))
    look |= {"vmax": 1, "square": True, "size": 6}
    return drawing.heat_maps(maps, bar, cols=4, panel=panel, **look)[0]


def _tell_similarity(table: pd.DataFrame) -> str:
    pairs = table[table["expert_a"] < table["expert_b"]]
    if pairs.empty:
        return "No layer has two experts to compare."
    words = [
        f"{text.where(part.iloc[0], pairs)} {text.span(part['cosine'])} "
        f"(centred {text.span(part['cosine_centred'])})"
        for part in drawing.by_layer(pairs).values()
    ]
    return f"Cosines of two experts' mean inputs: {'; '.join(words)}."


@drawing.plot(_tell_similarity)
def similarity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.similarity``: raw and centred cosines of a layer side by side."""
    maps = {
        f"{title}, {name}": drawing.square(part, column, "expert")
        for title, part in drawing.by_layer(table).items()
        for column, name in (("cosine", "raw"), ("cosine_centred", "centred"))
    }
    fig = _draw_pairs(maps, "cosine of mean inputs", cmap=style.DIVERGING, vmin=-1)
    return drawing.finish(fig, table, caption, x="expert", y="expert")


def _tell_similarity_summary(rows: pd.DataFrame) -> str:
    return (
        f"{text.course(rows, 'mean')}, centred {text.span(rows['centred_mean'])}; nearly "
        f"orthogonal are {text.span(rows['near_orthogonal'], text.percent)} of the pairs, the "
        f"common mean holds {text.span(rows['common_mean'], text.percent)}"
    )


@drawing.plot(_tell_similarity_summary, "Mean cosine of two experts' mean inputs over the layers")
def similarity_summary(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.similarity_summary``: cosines and common mean over the layers."""
    systems = table.sort_values("layer", kind="stable").groupby("system", sort=False)
    size = (6.6, 0.5 + 2.5 * len(systems))
    fig, axes = style.figure(*size, len(systems), 2, squeeze=False, sharex=True)
    for (left, right), (system, rows) in zip(axes, systems, strict=True):
        x, of_system = rows["layer"], f"{system}: " if len(systems) > 1 else ""
        for prefix, name, colour, aside in _COSINES:
            low, mean, high = (rows[f"{prefix}{end}"] for end in ("min", "mean", "max"))
            left.vlines(x + aside, low, high, color=colour, lw=1, alpha=0.6)
            left.plot(x + aside, mean, "o-", color=colour, label=f"{name}: mean, range")
        left.plot(x, rows["centred_expected"], ":", color=style.INK, lw=1, label="−1 / (k − 1)")
        left.set(ylabel="cosine", ylim=(-1.02, 1.02), title=f"{of_system}pairs of experts")
        for column, colour, label in _SHARES:
            right.plot(x, rows[column], "o-", color=colour, label=label)
        right.set(ylabel="share", ylim=(-0.02, 1.02), title="common mean, near-orthogonal")
    return drawing.finish(fig, table, caption, *axes[0], layers=axes.flat, columns=2)
