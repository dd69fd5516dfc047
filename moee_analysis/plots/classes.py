"""What experts stand for: classes, as in the paper's Figures 3 and 4, and parts of the scene."""

import pandas as pd
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_BESIDE = {
    "xytext": (3, 0), "textcoords": "offset points", "va": "center", "size": 6.5,
    "color": style.GREY, "annotation_clip": False,
}  # fmt: skip
_HOLLOW = {"ls": "", "marker": "o", "mfc": "white", "mew": 1.2}
_NULLS = {
    "class_null_high": "masks exchanged within a class, 95 %",
    "null_high": "masks exchanged between any images, 95 %",
}


def _tell_class_routing(table: pd.DataFrame) -> str:
    leads = table.assign(lead=table["share"] - table["share_all"]).dropna(subset="lead")
    if leads.empty:
        return "No share is known."
    leads = leads.sort_values("lead", ascending=False, kind="stable")
    tops = leads.drop_duplicates(["system", "layer"]).sort_index(kind="stable")
    most, least = (
        f"{text.where(row, table)}: {text.percent(row['share'])} of the tokens of "
        f"{row['class_name']} go to expert {row['expert']} (all classes: "
        f"{text.percent(row['share_all'])})"
        for row in (text.largest(tops, "lead"), text.smallest(tops, "lead"))
    )
    also = f"; least in {least}" if len(tops) > 1 else ""
    return f"A class leans most to one expert in {most}{also}."


@drawing.plot(_tell_class_routing)
def class_routing(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.class_routing``: layers by classes, beside the shares of all (pale)."""
    rows, colours = drawing.by_layer(table), style.colours(table["class_name"])
    width = max(1.5, 0.35 + 0.1 * table["expert"].nunique())
    size = (width * len(colours) + 0.5, 1.35 * len(rows) + 0.4)
    fig, grid = style.figure(*size, len(rows), len(colours), squeeze=False, sharey="row")
    for axes, (label, part) in zip(grid, rows.items(), strict=True):
        for ax, (name, colour) in zip(axes, colours.items(), strict=True):
            experts = part[part["class_name"] == name]
            experts = experts.sort_values("share_all", ascending=False, kind="stable")
            x, step = range(len(experts)), -(-len(experts) // 24)  # names would touch beyond 24
            ax.bar(x, experts["share_all"], width=0.92, color=style.PALE, label="all classes")
            ax.bar(x, experts["share"], width=0.5, color=colour, label="the class")
            ax.set_xticks(x[::step], experts["expert"][::step].astype(str), size=5.5)
            ax.tick_params(axis="x", length=0, pad=1)
            ax.grid(visible=False, axis="x")
            ax.margins(x=0.01)
        axes[0].set_ylabel(label)
    for ax, name in zip(grid[0], colours, strict=True):
        ax.set_title(name)
    labels = {"x": "expert, most used by all classes first", "y": "share of tokens"}
    return drawing.finish(fig, table, caption, grid[0, 0], **labels)


def _tell_specificity(rows: pd.DataFrame) -> str:
    mean = rows[rows["class_index"] < 0]
    return text.beyond("js", "permuted labels", shown="corrected", form=text.bits)(mean)


@drawing.plot(
    _tell_specificity, "Mean divergence of a class from all classes, in bits, bias removed"
)
def specificity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.specificity``: classes (thin) over the layers, their mean, it without bias."""
    colours = style.colours(table["system"])
    size = (4.4 if len(colours) == 1 else 3.6, 2.7)
    fig, axes = style.panels(len(colours), cols=3, size=size, sharex=True, sharey=True)
    for ax, (system, colour) in zip(axes, colours.items(), strict=True):
        rows = table[table["system"] == system].sort_values("layer")
        classes = rows[rows["class_index"] >= 0]
        for _, one in classes.groupby("class_name"):
            ax.plot(one["layer"], one["js"], color=colour, lw=0.7, alpha=0.35)
        ends = classes.groupby("class_name", sort=False).tail(1).sort_values("js")
        for end in ends.iloc[[0, -1][: len(ends)]].itertuples():
            ax.annotate(end.class_name, (end.layer, end.js), **_BESIDE)
        mean = rows[rows["class_index"] < 0]
        x, chance = mean["layer"], {"color": style.FAINT, "label": "permuted labels, 95 %"}
        ax.fill_between(x, 0, mean["null_high"], lw=0, **chance)
        ax.plot(x, mean["js"], color=colour, lw=2.4, label="mean over classes")
        ax.plot(x, mean["corrected"], "--o", color=colour, lw=1.2, label="bias removed, 95 %")
        ax.fill_between(x, mean["low"], mean["high"], color=colour, alpha=0.18, lw=0)
        ax.set(title=system, ylabel="", ylim=(0, None))
    shared = {"y": "divergence from all classes (bits)", "columns": 2 if len(colours) == 1 else 3}
    return drawing.finish(fig, table, caption, axes[0], layers=axes, **shared)


def _tell_class_information(rows: pd.DataFrame) -> str:
    return (
        f"{text.course(rows, 'corrected', text.percent)}, more than permuted labels in "
        f"{(rows['p'] < 0.05).sum()} of {len(rows)} layers"
    )


@drawing.plot(_tell_class_information, "Of the experts' entropy the class of the image explains")
def class_information(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.class_information`` over the layers; hollow is no more than chance."""
    fig, ax = style.figure(4.8, 2.9)
    drawing.curves(ax, table, "corrected", band=True)
    for system, look in style.looks(table["system"]).items():
        rows = table[(table["system"] == system) & (table["p"] >= 0.05)].set_index("layer")
        hollow = {"marker": look["marker"], "mec": look["color"], "zorder": 3}
        ax.plot(rows["corrected"], **_HOLLOW | hollow)
    ax.set(ylabel="I(class; expert) / H(expert),\nbias removed", ylim=(0, None))
    chance = {"no more than permuted labels": _HOLLOW | {"mec": style.GREY}}
    return drawing.finish(fig, table, caption, ax, chance, layers=[ax])


def _tell_class_distance(table: pd.DataFrame) -> str:
    pairs = table[table["class_index_a"] < table["class_index_b"]].dropna(subset="js")
    if pairs.empty:
        return "There are no two classes to compare."
    near = text.smallest(pairs, "js")
    far_pair, near_pair = (
        f"{row['class_a']} and {row['class_b']} in {text.where(row, table)} "
        f"({text.bits(row['js'])} bits)"
        for row in (text.largest(pairs, "js"), near)
    )
    return (
        f"Routed most differently: {far_pair}. Most alike: {near_pair}; two halves of one class "
        f"differ by {text.bits(near['floor'])}."
    )


@drawing.plot(_tell_class_distance)
def class_distance(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.class_distance``, families parted; the diagonal is two halves of a class."""
    layers = drawing.by_layer(table)
    cols, side = min(3, len(layers)), max(1.3, 0.12 * table["class_a"].nunique())
    size = (side + 0.3 + 1.5 / cols, side + 0.4 + 0.8 * cols / len(layers))
    fig, axes = style.panels(len(layers), cols=cols, size=size)
    for place, (ax, (title, part)) in enumerate(zip(axes, layers.items(), strict=True)):
        names = {"yticklabels": place % cols == 0, "xticklabels": place + cols >= len(layers)}
        look = {"cmap": style.SEQUENTIAL, "vmin": 0, "vmax": table["js"].max(), "square": True}
        mesh = drawing.heat_map(ax, drawing.square(part, "js", "class"), **names, **look)
        if "family_a" in part:
            families = part.drop_duplicates("order_a").sort_values("order_a")["family_a"]
            drawing.part_groups(families, ax.axhline, ax.axvline, color="white", lw=1.2)
        ax.set_title(title)
    drawing.bar_beside(fig, axes, mesh, "Jensen-Shannon divergence (bits)")
    return drawing.finish(fig, table, caption)


@drawing.plot(
    text.beyond("spearman", "permuted classes"),
    "Rank correlation of routing distance and classifier distance",
)
def class_relatedness(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.class_relatedness``: a line per system, chance dashed."""
    fig, ax = style.figure(4.8, 2.9)
    drawing.curves(ax, table, "spearman", chance={"null_high": "permuted classes, 95 %"})
    ax.axhline(0, **style.REFERENCE)
    ax.set_ylabel("rank correlation of routing\nand classifier distance")
    return drawing.finish(fig, table, caption, ax, layers=[ax], columns=2)


@drawing.plot(
    text.beyond("ami", "masks exchanged within a class", null="class_null_high"),
    "Adjusted mutual information of expert and part",
)
def modularity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.modularity``: a line per system, its chance levels below it."""
    fig, ax = style.figure(5.4, 3.2)
    drawing.curves(ax, table, "ami", band=True, chance=_NULLS)
    ax.axhline(0, **style.REFERENCE)
    ax.set_ylabel("adjusted mutual information\nof expert and part")
    return drawing.finish(fig, table, caption, ax, layers=[ax], columns=2)


def _tell_part_profile(table: pd.DataFrame) -> str:
    purest = text.largest(table, "share")
    if purest is None:
        return "No expert takes a patch."
    share, everywhere, size = (text.percent(purest[of]) for of in ("share", "share_all", "size"))
    return (
        f"Purest is expert {purest['expert']} of {text.where(purest, table)}: {share} of its "
        f"patches show {purest['part']}, of all patches {everywhere}. It takes {size} of the "
        "patches."
    )


@drawing.plot(_tell_part_profile)
def part_profile(table: pd.DataFrame, *, parts: int = 16, caption: str | None = None) -> Figure:
    """Draw ``measure.part_profile``: experts by the most frequent ``parts``, on top all patches."""
    frequent = table.sort_values("share_all", ascending=False, kind="stable")["part"].unique()
    layers = drawing.by_layer(table)
    maps = {name: _profiles(own).reindex(columns=frequent[:parts]) for name, own in layers.items()}
    rows, columns = (max(one.shape[axis] for one in maps.values()) for axis in (0, 1))
    size = (1.3 + 0.15 * columns, 0.9 + 0.14 * max(8, rows))
    norm = PowerNorm(0.5, vmin=0, vmax=table["share"].max())  # shows small shares too
    look = {"cmap": style.SHARES, "norm": norm, "most": max(rows, columns)}
    bar = "share of the expert's patches"
    fig, axes = drawing.heat_maps(maps, bar, cols=3, panel=size, **look)
    for ax in axes:
        ax.axhline(1, color="white", lw=5)
    return drawing.finish(fig, table, caption, y="expert (share of patches)")


def _profiles(rows: pd.DataFrame) -> pd.DataFrame:
    """Shares of parts (columns) of all patches, then of those of each expert in order."""
    experts = rows.pivot(index="order", columns="part", values="share").fillna(0)
    first = rows.drop_duplicates("order").sort_values("order")
    names = first["expert"].astype(str) + first["size"].map(" ({:.0%})".format)
    everything = rows.drop_duplicates("part").set_index("part")["share_all"]
    return pd.concat([everything.to_frame("all").T, experts.set_axis(names)])
