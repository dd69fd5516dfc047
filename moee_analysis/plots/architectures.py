"""Several architectures side by side, and where the multiply-accumulates of one go."""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from moee_analysis.plots import drawing, style, text

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
_BAR = 0.72  # of the room between two layers


@style.house
def architectures(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.architectures``: a panel per quantity, a line per model.

    Layers are laid over each other by their relative depth; dotted is chance.
    """
    shown = [name for name in _TITLES if name in set(table["quantity"])]
    fig, axes = style.panels(len(shown), cols=3, size=(2.5, 2.0), sharex=True)
    looks = style.looks(table["model"])
    for ax, quantity in zip(axes, shown, strict=True):
        rows = drawing.in_percent(table[table["quantity"] == quantity], "depth")
        if "%" in _TITLES[quantity]:
            rows = drawing.in_percent(rows, "value", "chance")
        chance = {"chance": ":"} if rows["chance"].notna().any() else None
        drawing.curves(ax, rows, "value", x="depth", by="model", looks=looks, chance=chance)
        ax.set(title=_TITLES[quantity], xlim=(0, 100))
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    fig.supxlabel("depth (% of the layers, the first at the left)")
    drawing.legend(fig, axes[0])
    return drawing.finish(fig, table, caption)


@text.describes(architectures)
def _describe_architectures(table: pd.DataFrame) -> str:
    words = []
    for quantity, (name, form) in _WORDS.items():
        rows = table[table["quantity"] == quantity].groupby("model", sort=False)["value"]
        if len(rows):
            models = text.listed(f"{model} {text.span(values, form)}" for model, values in rows)
            words.append(f"{name}: {models}.")
    return " ".join(words) or "No quantity is known."


@style.house
def architecture_variants(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.architecture_variants``: retention, a group of marks per model."""
    models = list(table["model"].unique())
    shares = drawing.in_percent(table, "retention", "retention_low", "retention_high")
    shares = shares[shares["variant"] != "dense"].dropna(subset="retention")
    looks = style.looks(shares["variant"])
    fig, ax = style.figure(1.6 + 1.7 * len(models), 3.0)
    places = drawing.spread(len(looks), 0.64)
    for place, (variant, look) in zip(places, looks.items(), strict=True):
        rows = shares[shares["variant"] == variant]
        x, ends = rows["model"].map(models.index) + place, ("retention_low", "retention_high")
        ax.vlines(x, *(rows[end] for end in ends), color=look["color"], **style.INTERVAL)
        ax.plot(x, rows["retention"], ls="", ms=5.5, mec="white", label=variant, **look)
    ax.axhline(100, **style.REFERENCE)
    ax.set_xticks(range(len(models)), models)
    ax.set(xlim=(-0.5, len(models) - 0.5), ylabel="dense top-1 retained (%)")
    ax.grid(visible=False, axis="x")
    drawing.legend(fig, ax, columns=3)
    return drawing.finish(fig, table, caption)


@text.describes(architecture_variants)
def _describe_architecture_variants(table: pd.DataFrame) -> str:
    variants = table[table["variant"] != "dense"]
    kept = [f"{text.percent(row.retention)} ({row.variant})" for row in variants.itertuples()]
    words = text.of_each(
        variants.assign(kept=kept), lambda rows: text.listed(rows["kept"]), "model"
    )
    return f"Kept of the dense top-1: {words}."


@style.house
def macs(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a table of ``measure.macs``: MACs and parameters of every MLP, totals in the titles.

    Outlines are the dense model, pale bars layers that stayed dense, hatched is for tokens that
    nothing reads.
    """
    layers = table[table["layer"] >= 0]
    total = table[table["component"] == "total"].iloc[0]
    fig, (left, right) = style.figure(max(6.4, 3.4 + 0.34 * len(layers)), 2.7, 1, 2)
    _draw_bars(left, layers, "macs", style.PALETTE[0])
    _hatch_unread(left, layers)
    _draw_bars(right, layers, "params", style.PALETTE[2])
    left.set(ylabel="MACs per image (M)", title=_totals("MACs", total, "macs"))
    right.set(ylabel="parameters (M)", title=_totals("parameters", total, "params"))
    fig.supxlabel("MLP of " + style.LAYER_AXIS)
    facts = "Outlines: the dense model; pale: layers that stayed dense. "
    if (table["macs_unread_dense"] > 0).any():
        facts += "Hatched: for tokens that nothing reads. "
    return style.caption(fig, caption or facts + table.attrs.get("caption", ""))


def _draw_bars(ax: Axes, layers: pd.DataFrame, column: str, colour: str) -> None:
    x = layers["layer"]
    shades = [(colour, 1.0 if converted else 0.35) for converted in layers["converted"]]
    outline = {"facecolor": "none", "edgecolor": style.GREY, "lw": 1}
    ax.bar(x, layers[column] / 1e6, _BAR, color=shades, lw=0)
    ax.bar(x, layers[f"{column}_dense"] / 1e6, _BAR, **outline)
    ax.set_xticks(x if len(x) <= 14 else x[::2])
    ax.grid(visible=False, axis="x")


def _hatch_unread(ax: Axes, layers: pd.DataFrame) -> None:
    """Hatch what goes to tokens that nothing reads: at the top of a bar, and of its outline."""
    for end, colour, zorder in (("", "white", 3), ("_dense", style.GREY, 0.5)):
        rows = layers[layers[f"macs_unread{end}"] > 0]
        unread, top = rows[f"macs_unread{end}"] / 1e6, rows[f"macs{end}"] / 1e6
        hatch = {"facecolor": "none", "edgecolor": colour, "hatch": "////", "lw": 0}
        ax.bar(rows["layer"], unread, _BAR, bottom=top - unread, zorder=zorder, **hatch)


def _totals(name: str, total: pd.Series, column: str) -> str:
    """``MACs: 1.254 → 0.903 G (−28.0 %)``, of the whole network."""
    dense, now = total[f"{column}_dense"], total[column]
    unit, symbol = (1e9, "G") if dense >= 1e9 else (1e6, "M")
    change = text.change(now, dense)
    return f"{name}: {dense / unit:.3f} → {now / unit:.3f} {symbol} ({change})"


@text.describes(macs)
def _describe_macs(table: pd.DataFrame) -> str:
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
