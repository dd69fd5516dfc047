"""The figures of the benchmarks: fidelity, speed-ups, times of clusterings and extractions."""

import math

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from moee_analysis.plots import style
from moee_analysis.plots.drawing import plain_log

Look = dict[str, str]  # colour, marker and line of a system

LINE = {"lw": 1.4, "ms": 4.8, "mec": "white", "mew": 0.5}
DENSE = {"color": style.GREY, "lw": 1}
PANEL = (3.3, 2.9)  # inches
ASKED = ["macs_asked", "params_asked"]
KL_TICKS = (0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1)  # nats
SEVERAL = " at −"  # between a system and its budget, where it has several


@style.house
def clustering_time(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw seconds and largest memory against the number of tokens, a line for each system.

    ``table`` has one row for each system and size: ``system``, ``tokens``, ``seconds``, ``peak_gb``
    (decimal gigabytes) and ``exponent``, that of the tokens in the system's seconds (nan: unknown).
    """
    fig, (time, memory) = style.panels(2, size=PANEL)
    for ax, column in ((time, "seconds"), (memory, "peak_gb")):
        for system, look in style.looks(table["system"]).items():
            rows = table[table["system"] == system].sort_values("tokens")
            exponent = rows["exponent"].iloc[0]
            name = system if math.isnan(exponent) else f"{system}: n^{exponent:.2f}"
            ax.plot(rows["tokens"], rows[column], label=name, **look, **LINE)
        sizes = table["tokens"].unique()
        ax.set(xscale="log", xlabel="tokens")
        ax.set_xticks(sizes, [f"{size / 1000:g}k" for size in sizes])
        ax.minorticks_off()
    time.set(ylabel="time (s)", title="time", yscale="log")
    plain_log(time.yaxis, subs=(1, 3))
    memory.set(ylabel="largest memory (GB)", title="memory of the whole process", ylim=(0, None))
    time.legend(loc="lower right")
    return style.caption(fig, caption or table.attrs.get("caption"))


@style.house
def extraction_time(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw the time of each stage, stacked, in plain forward passes; a panel for each recipe.

    ``table`` has one row for each recipe, number of images and stage: ``recipe``, ``images``,
    ``stage``, ``passes``.
    """
    recipes = list(dict.fromkeys(table["recipe"]))
    fig, axes = style.panels(len(recipes), size=PANEL)
    colours = style.colours(s for s in table["stage"] if s != "other") | {"other": style.GREY}
    for ax, recipe in zip(axes, recipes, strict=True):
        _draw_stages(ax, table[table["recipe"] == recipe], colours)
        ax.set(title=f"recipe {recipe}", xlabel="calibration images")
    axes[0].set_ylabel("time (plain forward passes)")
    handles = {h.get_label(): h for ax in axes for h in ax.containers}
    ordered = [handles[name] for name in colours if name in handles]
    fig.legend(handles=ordered, loc="outside right upper")
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw_stages(ax: Axes, table: pd.DataFrame, colours: dict[str, str]) -> None:
    heights = table.pivot_table(index="images", columns="stage", values="passes", fill_value=0.0)
    places, bottom = np.arange(len(heights)), np.zeros(len(heights))
    for stage in (name for name in colours if name in heights):
        ax.bar(places, heights[stage], 0.62, bottom=bottom, color=colours[stage], label=stage)
        bottom += heights[stage].to_numpy()
    for place, total in zip(places, bottom, strict=True):
        ax.annotate(f"{total:.1f}", (place, total), (0, 2), textcoords="offset points", ha="center")
    ax.set_xticks(places, [str(images) for images in heights.index])
    ax.margins(y=0.1)


@style.house
def inference(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw speed-up against batch size: a panel for each number of threads, a line for each system.

    Dotted lines are what the MACs promise, 1 is the dense model. ``table`` has one row for each
    system, batch size and number of threads: ``system``, ``batch``, ``threads``, ``speedup``,
    ``speedup_low`` and ``speedup_high`` (quartiles), ``promised``; the system ``dense`` is the 1.
    """
    others = table[table["system"] != "dense"]
    threads, batches = sorted(table["threads"].unique().tolist()), table["batch"].unique()
    fig, panels = style.panels(len(threads), cols=3, size=(2.7, 2.9), sharex=True, sharey=True)
    fig.set_figwidth(fig.get_figwidth() + 2)  # for the legend
    looks, apart = style.looks(others["system"]), 0.45  # of a doubling of the batch
    for ax, count in zip(panels, threads, strict=True):
        _draw_speed_ups(ax, others[others["threads"] == count], looks, apart=apart)
        ax.set(title=f"{count} thread{'s' * (count > 1)}", xlabel="batch (images)")
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(batches, [str(batch) for batch in batches])
    panels[0].set_xlim(batches.min() / 2**apart, batches.max() * 2**apart)
    panels[0].minorticks_off()
    fig.supylabel("speed-up (dense time / time)")
    lines = {system: Line2D([], [], **look, **LINE) for system, look in looks.items()}
    lines["promised by the MACs"] = Line2D([], [], color=style.INK, lw=1.2, ls=":")
    lines["dense model"] = Line2D([], [], **DENSE)
    fig.legend([*lines.values()], [*lines], loc="outside right center", handlelength=2.6)
    return style.caption(fig, caption or table.attrs.get("caption"))


@style.house
def kl_against_time(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw divergence against time, a panel for each batch size, with the most threads there are.

    A colour for each system, whose budgets a line joins, a marker for each engine. ``table`` has
    one row for each system, engine, batch size and number of threads: ``system``, ``engine``,
    ``batch``, ``threads``, ``ms`` (of a batch), ``kl`` (nats); rows without it are left out.
    """
    known = table[(table["threads"] == table["threads"].max()) & table["kl"].notna()]
    known = known.assign(time=known["ms"] / known["batch"])
    known["system"] = known["system"].str.split(SEVERAL).str[0]
    batches = sorted(known["batch"].unique().tolist())
    fig, panels = style.panels(len(batches), cols=3, size=(2.7, 2.9), sharey=True)
    fig.set_figwidth(fig.get_figwidth() + 2)  # for the legend
    looks = {"palette": style.colours(known["system"]), "dashes": False}
    looks["markers"] = dict(zip(known["engine"].unique(), style.MARKERS, strict=False))
    for ax, batch in zip(panels, batches, strict=False):
        rows = known[known["batch"] == batch]
        names = {"x": "time", "y": "kl", "hue": "system", "style": "engine"}
        sns.lineplot(rows, **names, **looks, ax=ax, estimator=None, mec="white", mew=0.5)
        ax.set(title=f"batches of {batch}", xlabel="time of an image (ms)", ylabel="KL (nats)")
        ax.set_yscale("symlog", linthresh=KL_TICKS[1])  # with the zero of the dense model
        ax.set_yticks(KL_TICKS, [f"{value:g}" for value in KL_TICKS])
        ax.minorticks_off()
        handles, labels = ax.get_legend_handles_labels()
        ax.get_legend().remove()
    if batches:
        fig.legend(handles, labels, loc="outside right center")
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw_speed_ups(ax: Axes, table: pd.DataFrame, looks: dict[str, Look], *, apart: float) -> None:
    ax.axhline(1, **DENSE, zorder=1)
    for system, offset in _beside([*looks], apart).items():
        look, rows = looks[system], table[table["system"] == system].sort_values("batch")
        x = rows["batch"].to_numpy(float) * 2**offset
        low, high = rows["speedup_low"], rows["speedup_high"]
        ax.vlines(x, low, high, color=look["color"], **style.INTERVAL)
        ax.plot(x, rows["speedup"], zorder=4, **look, **LINE)
        for promised in rows.loc[rows["promised"] > 1, "promised"].unique():
            ax.axhline(promised, color=look["color"], zorder=2, lw=1.2, ls=":")


@style.house
def fidelity(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw divergence and retention against the MACs saved, one line for each system.

    Left: budgets of the MACs alone, over the MACs that were really saved. Right, if there are any:
    budgets of MACs and stored parameters, in steps, as they were asked for.

    ``table`` has one row for each system and budget: ``system``, ``family`` (a hue, a kind of line
    and a heading in the legend), ``macs_asked``, ``params_asked`` (nan: free), ``macs_reduction``,
    ``retention``, ``retention_low``, ``retention_high``, all shares, ``kl`` and its standard error
    ``kl_error``, in nats. Rows without retention are left out.
    """
    known = table[table["retention"].notna()]
    known = known.assign(x=100 * known["macs_reduction"])
    bound = known["params_asked"].notna()
    budgets = sorted(known.loc[bound, ASKED].drop_duplicates().itertuples(index=False, name=None))
    widths = [] if bound.any() and bound.all() else [3.6, 3.6]  # inches
    if bound.any():
        widths.append(max(2.2, 0.95 * len(budgets)))
    fig, axes = style.figure(
        sum(widths) + 2.1, 3.6, 1, len(widths), squeeze=False, width_ratios=widths
    )
    looks, panels = _family_looks(known), list(axes[0])
    if bound.any():
        asked = known.loc[bound, ASKED].itertuples(index=False, name=None)
        placed = known[bound].assign(x=[float(budgets.index(pair)) for pair in asked])
        _draw_bound(panels.pop(), placed, budgets, looks)
    if not bound.all():
        _draw_free(panels, known[~bound], looks)
    _family_legend(fig, known, looks)
    return style.caption(fig, caption or table.attrs.get("caption"))


def _draw_free(panels: list[Axes], table: pd.DataFrame, looks: dict[str, Look]) -> None:
    """Budgets of MACs alone: divergence on the left, retention on the right."""
    divergence, retention = panels
    _draw_lines(divergence, _divergences(table), looks, apart=0.8)  # points of MACs
    _draw_lines(retention, _retentions(table), looks, apart=0.8)
    _name_retention(retention)
    divergence.set(ylabel="KL divergence from the dense model (nats)", yscale="log")
    plain_log(divergence.yaxis, subs=(1, 3))
    for ax in panels:
        words = "MACs saved (%; systems set a little apart)"
        ax.set(xlabel=words, title="stored parameters free")


def _draw_bound(
    ax: Axes, table: pd.DataFrame, budgets: list[tuple[float, float]], looks: dict[str, Look]
) -> None:
    """Budgets of MACs and parameters, ``x`` the place of each; retention."""
    _draw_lines(ax, _retentions(table), looks, apart=0.64)  # of a budget's place
    _name_retention(ax)
    names = [f"−{100 * macs:g} %\n−{100 * params:g} %" for macs, params in budgets]
    ax.set_xticks(range(len(budgets)), names)
    ax.set_xlim(-0.5, len(budgets) - 0.5)
    ax.set(xlabel="budget of MACs, of parameters", title="stored parameters bound")
    ax.grid(visible=False, axis="x")


def _name_retention(ax: Axes) -> None:
    ax.axhline(100, **style.REFERENCE)
    ax.set_ylim(bottom=max(-2.5, ax.get_ylim()[0]))
    ax.set(ylabel="top-1 retained (% of the dense model's)")


def _retentions(table: pd.DataFrame) -> pd.DataFrame:
    """Values, and the ends of their intervals, in percent."""
    names = {"value": "retention", "low": "retention_low", "high": "retention_high"}
    return table.assign(**{new: 100 * table[name] for new, name in names.items()})


def _divergences(table: pd.DataFrame) -> pd.DataFrame:
    """Values and 95 % intervals, in nats."""
    kl, reach = table["kl"], 1.96 * table["kl_error"]
    return table.assign(value=kl, low=(kl - reach).clip(lower=kl / 10), high=kl + reach)


def _draw_lines(ax: Axes, table: pd.DataFrame, looks: dict[str, Look], *, apart: float) -> None:
    """A line for every system over ``x``, with its intervals."""
    for system, offset in _beside(table["system"].unique(), apart).items():
        look, rows = looks[system], table[table["system"] == system].sort_values("x")
        x, front = rows["x"].to_numpy(float) + offset, 4 if look["ls"] == "-" else 3
        ax.vlines(x, rows["low"], rows["high"], color=look["color"], zorder=front, **style.INTERVAL)
        ax.plot(x, rows["value"], zorder=front, **look, **LINE)


def _beside(systems: list[str], width: float) -> dict[str, float]:
    """How far each system stands from its place, so that none hides the intervals of another."""
    places = np.linspace(-width / 2, width / 2, len(systems)) if len(systems) > 1 else [0.0]
    return dict(zip(systems, places, strict=True))


def _family_looks(table: pd.DataFrame) -> dict[str, Look]:
    """A look for every system: hue and line by its family, shade and marker by its place in it."""
    hues = (  # from the first system of a family to its last
        ("#F2B56B", "#D55E00", "#6B2A00"), ("#66C2A4", "#00684A"), ("#CC79A7", "#571F40"),
        ("#56B4E9", "#0B3C8C"), ("#E8D44D", "#6E6200"), ("#B0B0B0", "#2B2B2B"),
    )  # fmt: skip
    looks = {}
    for place, (_, rows) in enumerate(table.groupby("family", sort=False)):
        systems = list(rows["system"].drop_duplicates())
        shades = LinearSegmentedColormap.from_list("", hues[place % len(hues)])
        for number, system in enumerate(systems):
            shade = number / (len(systems) - 1) if len(systems) > 1 else 0.5
            looks[system] = {
                "color": to_hex(shades(shade)), "ls": ("--", "-", ":", "-.")[place % 4],
                "marker": style.MARKERS[number % 7],
            }  # fmt: skip
    return looks


def _family_legend(fig: Figure, table: pd.DataFrame, looks: dict[str, Look]) -> None:
    """Name the systems beside the panels, below the names of their families."""
    handles, names, headings = [], [], []
    for family, rows in table.groupby("family", sort=False):
        headings.append(len(names))
        systems = list(rows["system"].drop_duplicates())
        handles += [Line2D([], [], lw=0), *(Line2D([], [], **looks[s], **LINE) for s in systems)]
        names += [family, *systems]
    handles.append(Line2D([], [], **DENSE))
    legend = fig.legend(
        handles, [*names, "dense model"], loc="outside right center", handlelength=2.6
    )
    for number in headings:
        legend.get_texts()[number].set(weight="bold")
