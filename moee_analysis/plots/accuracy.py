"""What systems and architectures keep of the dense model's accuracy, and what they cost."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

_RETENTION = ("retention", "retention_low", "retention_high")
_DOT = {"marker": "o", "ls": "", "color": style.INK, "ms": 6, "mec": style.INK, "mew": 1.3}
_LINE = {"lw": 1.5, "ms": 4.8, "mec": "white"}
_OTHERS = {"lw": 0.8, "color": style.PALE, "zorder": 1}
_FRONTIER = {"lw": 1, "color": "black", "ls": ":", "zorder": 2}
_APART = 0.9  # points of MACs between the first and the last system of a panel
_TITLES = {
    "experts": "experts", "active": "hidden neurons in use (%)", "evenness": "evenness of use",
    "class": "class explains (% of entropy)", "similarity": "cosine of mean inputs",
    "part": "mutual information with parts",
}  # fmt: skip
_WORDS = {
    "experts": ("Experts per layer", text.whole),
    "active": ("Hidden neurons a token uses", text.percent),
    "class": ("Of the experts' entropy the class explains", text.percent),
}
_RETAINED = "top-1 retained (% of the dense model's)"
_COSTS = {
    "macs": ("MACs", "MACs per image (M)", style.PALETTE[0]),
    "params": ("parameters", "parameters (M)", style.PALETTE[2]),
}
_BAR = 0.72  # of the room between two layers
_CONTROLS = {
    "mean": ("its own router", "o", style.PALETTE[0]),
    "oracle_routing": ("oracle routing", "^", style.PALETTE[2]),
    "random_routing": ("random routing", "x", style.PALETTE[1]),
    "constant_routing": ("constant routing", "_", style.INK),
}


def _tell_accuracy(table: pd.DataFrame) -> str:
    if table["retention"].isna().all():
        scores = table["system"] + " " + table["top1"].map(text.percent)
        return f"Top-1 is: {text.listed(scores)}."
    others = table[table["kl"] != 0]  # the dense model is at no distance from itself
    dense = f"of the dense top-1 ({text.percent(table['reference_top1'].max())})"
    if others.empty:
        return f"All {dense} is kept."
    kept = others["retention"].map(text.percent)
    first = f"{others['system'].iloc[0]} keeps {kept.iloc[0]} {dense}"
    return ", ".join([first, *(others["system"] + " " + kept)[1:]]) + "."


@drawing.plot(_tell_accuracy)
def accuracy(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.accuracy``: top-1, and what it is beside a reference (grey line)."""
    compared = bool(table["retention"].notna().any())
    size = (7.6 if compared else 4.6, 1.15 + 0.32 * len(table))
    fig, ((left, *rest),) = style.figure(*size, 1, 1 + compared, sharey=True, squeeze=False)
    columns = ("top1", "low", "high", "reference_top1", *_RETENTION, "agreement")
    shares, systems = drawing.in_percent(table, *columns), table["system"]
    colours = list(systems.map(style.colours(systems)))
    drawing.dots(left, shares, ("top1", "low", "high"), systems, colours=colours)
    left.set_xlabel("top-1 accuracy (%)")
    facts = f"{table['n_images'].max()} images; bars are 95 % intervals of the image bootstrap"
    for ax in rest:
        left.axvline(shares["reference_top1"].max(), **style.REFERENCE)
        ax.axvline(100, **style.REFERENCE)
        drawing.dots(ax, shares, _RETENTION, systems, colours=colours)
        hollow = {"s": 34, "facecolor": "white", "linewidth": 1.3, "zorder": 2}
        ax.scatter(shares["agreement"], range(len(table)), edgecolor=colours, **hollow)
        ax.set_xlabel("compared with the reference (%)")
        facts += "; retention is top-1 / the reference's top-1 (grey line), agreement the share "
        facts += "of images with the reference's prediction"
    marks = {"retention": _DOT, "agreement": _DOT | {"mfc": "white"}} if compared else {}
    return drawing.finish(fig, table, caption or f"{facts}.", marks, loc="outside upper right")


def _tell_trade_off(table: pd.DataFrame) -> str:
    words = []
    for asked, rows in table.groupby("macs_asked"):
        kl = text.listed(rows["system"] + " " + rows["kl"].map(text.bits))
        words.append(f"at −{100 * asked:g} % MACs {kl}")
    return f"Divergence from the dense model in nats: {'; '.join(words)}."


@drawing.plot(_tell_trade_off)
def trade_off(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw rows of ``measure.accuracy`` over the share of MACs saved, a line for each system.

    They have ``macs_asked`` and ``macs_reduction`` too, shares of the dense model's MACs.
    """
    shares = drawing.in_percent(table, "macs_reduction", *_RETENTION)
    fig, (left, right) = style.figure(7.4, 3.2, 1, 2)
    for ax, value, title in (
        (left, "kl", "KL from the dense model (nats)"), (right, "retention", _RETAINED),
    ):  # fmt: skip
        drawing.curves(ax, shares, value, x="macs_reduction", looks=style.looks(table["system"]))
        ax.set_title(title)
        drawing.whole_ticks(ax)
    left.set_yscale("log")
    drawing.plain_log(left.yaxis, subs=(1, 3))
    right.axhline(100, **style.REFERENCE)
    return drawing.finish(fig, table, caption, left, x="MACs saved (%)", columns=3)


def _tell_comparison(table: pd.DataFrame) -> str:
    words = []
    saving = table[table["reduces_macs"].astype(bool)].dropna(subset="mean")
    for asked, rows in saving.groupby("macs_asked"):
        best, worst = text.largest(rows, "mean"), text.smallest(rows, "mean")
        kept = f"{best['system']} keeps most ({text.percent(best['mean'])})"
        words.append(f"at −{100 * asked:g} % MACs {kept}")
        rival = text.largest(rows[rows["family"] != best["family"]], "mean")
        if rival is not None:
            kept = text.percent(rival["mean"])
            words[-1] += f", of the other families {rival['system']} ({kept})"
        if worst["system"] != best["system"]:
            words[-1] += f", and {worst['system']} ({text.percent(worst['mean'])}) least"
    return f"Of the dense top-1, {'; '.join(words)}." if words else "No saving is known."


@drawing.plot(_tell_comparison)
def comparison(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``comparison_table``: retention by MACs saved; grey other families, black the best."""
    means = _over_seeds(table)
    saving = means[means["reduces_macs"] > 0]
    best = means.loc[saving.groupby("macs_asked")["mean"].idxmax()].sort_values("macs_reduction")
    frontier = np.vstack([[0, 100], best[["macs_reduction", "mean"]]]).T  # from the dense model
    families = means["family"].unique()
    fig, axes = style.panels(len(families), cols=3, size=(2.9, 2.6), sharex=True, sharey=True)
    for ax, family in zip(axes, families, strict=True):
        others = means[means["family"] != family].sort_values("macs_reduction")
        for _, rows in others.groupby("system"):
            ax.plot(rows["macs_reduction"], rows["mean"], **_OTHERS)
        ax.plot(*frontier, **_FRONTIER)
        ax.axhline(100, **style.REFERENCE)
        _draw_family(ax, means[means["family"] == family])
        ax.set(title=family, ylim=(-3, 106))
    looks = {"most that a system keeps": _FRONTIER, "systems of other families": _OTHERS}
    looks |= {"dense model": style.REFERENCE}
    labels = {"x": "MACs saved (%; systems set a little apart)", "y": _RETAINED}
    return drawing.finish(fig, table, caption, looks, **labels)


def _over_seeds(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds in %, of each system and budget that could be made."""
    by = ["family", "system", "macs_asked"]
    means = table.dropna(subset="mean").groupby(by, sort=False).mean(numeric_only=True)
    shares = ("low", "high", "macs_reduction", "static_pruning", *_CONTROLS)
    return drawing.in_percent(means.reset_index(), *shares)


def _draw_family(ax: Axes, family: pd.DataFrame) -> None:
    names = family["system"].str.split(": |, ", n=1).str[-1]  # without the name of the family
    able = family.groupby("system")["reduces_macs"].transform("min") > 0
    names = names.where(able, names + " (cannot reduce MACs)")
    looks = {name: _LINE | look for name, look in style.looks(names).items()}
    for name in names[~able]:
        looks[name] |= {"mfc": "white", "mec": looks[name]["color"], "mew": 1.2}
    columns = ("macs_reduction", "mean", "low", "high")
    drawing.beside(ax, family.assign(name=names), columns, by="name", looks=looks, apart=_APART)
    ax.legend(loc="lower left", fontsize=6.5, handlelength=1.8, borderpad=0.2)


def _tell_routing_controls(table: pd.DataFrame) -> str:
    words, columns = [], ["mean", "random_routing", "static_pruning"]
    for asked, rows in table.dropna(subset=["mean", "random_routing"]).groupby("macs_asked"):
        means = rows.groupby("system", sort=False)[columns].mean()
        gain = means["mean"] - means["random_routing"]
        top = means.loc[gain.idxmax()]
        words.append(
            f"at −{100 * asked:g} % MACs {(gain > 0).sum()} of {len(means)} systems keep more "
            f"with their own router than with random routing, {top.name} gains most "
            f"({text.percent(top['mean'])} against {text.percent(top['random_routing'])}); the "
            f"best static pruning keeps {text.percent(means['static_pruning'].max())}"
        )
    return text.sentence("; ".join(words) or "no system has a router to compare")


@drawing.plot(_tell_routing_controls)
def routing_controls(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``comparison_table``: routers and controls in their place, by budget."""
    means = _over_seeds(table).dropna(subset="random_routing")
    budgets, systems = sorted(means["macs_asked"].unique()), means["system"].unique()
    size = (2.4 + 2.4 * len(budgets), 1.3 + 0.3 * len(systems))
    fig, axes = style.figure(*size, 1, len(budgets), squeeze=False, sharey=True, sharex=True)
    for ax, budget in zip(axes[0], budgets, strict=True):
        rows = means[means["macs_asked"] == budget].set_index("system").reindex(systems)
        ax.axvline(rows["static_pruning"].max(), label="best static pruning", **style.REFERENCE)
        places, look = range(len(rows)), style.INTERVAL | {"color": style.PALETTE[0]}
        ax.hlines(places, rows["low"], rows["high"], **look)
        for column, (label, marker, colour) in _CONTROLS.items():
            ax.plot(rows[column], places, marker, color=colour, mew=1.4, ms=5.5, label=label)
        ax.set(title=f"asked for −{100 * budget:g} % MACs", xlim=(-3, 106))
        drawing.row_axis(ax, systems)
    columns = 5 if len(budgets) > 1 else 3
    return drawing.finish(fig, table, caption, axes[0, 0], x=_RETAINED, columns=columns)


def _tell_architectures(table: pd.DataFrame) -> str:
    words = []
    for quantity, (name, form) in _WORDS.items():
        rows = table[table["quantity"] == quantity].groupby("model", sort=False)["value"]
        if len(rows):
            models = text.listed(f"{model} {text.span(values, form)}" for model, values in rows)
            words.append(f"{name}: {models}.")
    return " ".join(words) or "No quantity is known."


@drawing.plot(_tell_architectures)
def architectures(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.architectures``: over the relative depth, a line per model, chance dotted."""
    shown = [name for name in _TITLES if name in set(table["quantity"])]
    fig, axes = style.panels(len(shown), cols=3, size=(2.5, 2.0), sharex=True)
    looks = style.looks(table["model"])
    for ax, quantity in zip(axes, shown, strict=True):
        rows = drawing.in_percent(table[table["quantity"] == quantity], "depth")
        if "%" in _TITLES[quantity]:
            rows = drawing.in_percent(rows, "value", "chance")
        chance = {"chance": "chance"} if rows["chance"].notna().any() else None
        own = {"x": "depth", "by": "model", "looks": looks, "chance": chance, "dashes": ":"}
        drawing.curves(ax, rows, "value", **own)
        ax.set(title=_TITLES[quantity], xlim=(0, 100), ylim=(min(0, ax.get_ylim()[0]), None))
    depth = "depth (% of the layers, the first at the left)"
    return drawing.finish(fig, table, caption, *axes, x=depth)


def _tell_architecture_variants(rows: pd.DataFrame) -> str:
    variants = rows[rows["variant"] != "dense"]
    kept = zip(variants["retention"].map(text.percent), variants["variant"], strict=True)
    return text.listed(f"{share} ({variant})" for share, variant in kept)


@drawing.plot(_tell_architecture_variants, "Kept of the dense top-1", by="model")
def architecture_variants(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.architecture_variants``: retention, a group of marks per model."""
    models = list(table["model"].unique())
    known = table[table["variant"] != "dense"].dropna(subset="retention")
    shares = drawing.in_percent(known, *_RETENTION)
    fig, ax = style.figure(1.6 + 1.7 * len(models), 3.0)
    shares, columns = shares.assign(x=shares["model"].map(models.index)), ("x", *_RETENTION)
    looks = {name: _LINE | look for name, look in style.looks(shares["variant"]).items()}
    drawing.beside(ax, shares, columns, by="variant", looks=looks, apart=0.64, ls="", ms=5.5)
    ax.axhline(100, **style.REFERENCE)
    ax.set_xticks(range(len(models)), models)
    ax.set(xlim=(-0.5, len(models) - 0.5), ylabel="dense top-1 retained (%)")
    ax.grid(visible=False, axis="x")
    return drawing.finish(fig, table, caption, ax, columns=3)


def _tell_macs(table: pd.DataFrame) -> str:
    total = table[table["component"] == "total"].iloc[0]
    words = (
        f"An image takes {text.whole(total['macs'] / 1e6)} instead of the dense model's "
        f"{text.whole(total['macs_dense'] / 1e6)} million MACs "
        f"({text.change(total['macs'], total['macs_dense'])}); stored parameters change by "
        f"{text.change(total['params'], total['params_dense'])}."
    )
    mlps = table[table["layer"] >= 0]
    mlps = mlps.assign(left=mlps["macs"] / mlps["macs_dense"])
    most, least = text.smallest(mlps, "left"), text.largest(mlps, "left")
    if most is None or most["layer"] == least["layer"]:
        return words
    ends = [f"layer {row['layer']} ({text.change(row['left'], 1)})" for row in (most, least)]
    return f"{words} Of the MLPs' MACs most is saved in {ends[0]}, least in {ends[1]}."


@drawing.plot(_tell_macs)
def macs(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw ``measure.macs``: MACs and parameters of every MLP, totals in the titles."""
    layers = table[table["layer"] >= 0]
    total = table[table["component"] == "total"].iloc[0]
    fig, axes = style.figure(max(6.4, 3.4 + 0.34 * len(layers)), 2.7, 1, 2)
    x, ticks = layers["layer"], layers["layer"][:: 1 if len(layers) <= 14 else 2]
    outline = {"facecolor": "none", "edgecolor": style.GREY, "lw": 1}
    for ax, (column, (name, label, colour)) in zip(axes, _COSTS.items(), strict=True):
        shades = [(colour, 1.0 if converted else 0.35) for converted in layers["converted"]]
        ax.bar(x, layers[column] / 1e6, _BAR, color=shades, lw=0)
        ax.bar(x, layers[f"{column}_dense"] / 1e6, _BAR, **outline)
        dense, now = total[f"{column}_dense"], total[column]
        unit, symbol = (1e9, "G") if dense >= 1e9 else (1e6, "M")
        numbers = f"{dense / unit:.3f} → {now / unit:.3f} {symbol} ({text.change(now, dense)})"
        ax.set(title=f"{name}: {numbers}", ylabel=label, xticks=ticks)
        ax.grid(visible=False, axis="x")
    for end, colour, zorder in (("", "white", 3), ("_dense", style.GREY, 0.5)):
        rows = layers[layers[f"macs_unread{end}"] > 0]
        unread, top = rows[f"macs_unread{end}"] / 1e6, rows[f"macs{end}"] / 1e6
        hatch = {"facecolor": "none", "edgecolor": colour, "hatch": "////", "lw": 0}
        axes[0].bar(rows["layer"], unread, _BAR, bottom=top - unread, zorder=zorder, **hatch)
    facts = "Outlines: the dense model; pale: layers that stayed dense. "
    if (table["macs_unread_dense"] > 0).any():
        facts += "Hatched: for tokens that nothing reads. "
    facts += table.attrs.get("caption", "")
    return drawing.finish(fig, table, caption or facts, x="MLP of " + style.LAYER_AXIS)
