"""One call that is a panel of widgets in JupyterLab, and a grid of figures where nobody clicks."""

import itertools
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import ipywidgets as widgets
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure
from PIL import Image

from moee_analysis.errors import MoeeError
from moee_analysis.plots.drawing import sheet
from moee_analysis.report.notebook.results import picture
from moee_analysis.report.pictures import data_uri, shrink
from moee_analysis.utils.progress import is_headless, is_in_notebook

Plot = Callable[..., Figure]
Choice = dict[str, Any]

FIGURES = 6  # of a static grid, at most
THUMBNAIL, SMALL = 96, 560  # pixels: of an image to browse; of narrow figures, enlarged
WRAPPED = {"flex_flow": "row wrap", "align_items": "center"}
CELL = ":is(.jp-OutputArea, .cell_container, #output-area)"  # JupyterLab, VS Code, Colab
STILL = f"""<style>{CELL}:has(.jupyter-widgets :not(script)) .moee-still {{ display: none }}
{CELL}:has(.moee-still) .lm-Panel:not(:has(*)) {{ display: none }}</style>"""
"""The still figure hides beside a living panel; a dead one, no more than a text, beside it."""


@dataclass(frozen=True)
class DependsOn:
    """Values of a choice, such as the experts of a layer, by the value of another one before it."""

    other: str
    values: Mapping[Hashable, Sequence[Any]]


@dataclass(frozen=True)
class Pictures:
    """Images to browse, uint8 (height, width, 3), and their names; the choice is a place."""

    thumbnails: Sequence[np.ndarray]
    names: Sequence[str]


Values = Sequence[Any] | DependsOn | Pictures


def explore(
    plot: Plot, *, shown: Mapping[str, Sequence[Any]] | None = None, caption: str | None = None,
    **choices: Values,
) -> widgets.Widget | Figure:  # fmt: skip
    """Show ``plot(**choice)`` for a choice that a person makes, or for a few of them.

    In JupyterLab this is a panel: ascending whole numbers are a slider, other values a list to
    pick from, :class:`Pictures` a browser of images. Without a kernel the first figure stands
    there. Headless, and outside notebooks, it is one figure with the plots of at most
    :data:`FIGURES` choices side by side: of the values in ``shown``, by the name of a choice, else
    of evenly spaced ones. ``plot`` takes the choices by name, as one of :func:`of_table` does:

    >>> explore(of_table(plots.class_routing, table), layer=values_of(table, "layer"))
    """
    if not choices:
        raise MoeeError("a choice to explore", "none", "pass values by name, such as layer=[0, 1]")
    for place, (name, values) in enumerate(choices.items()):
        before = list(choices)[:place]
        if isinstance(values, DependsOn) and values.other not in before:
            expected = f"'{name}' after '{values.other}', which it depends on"
            found = f"{', '.join(before) or 'nothing'} before it"
            raise MoeeError(expected, found, "give the choices in that order")
        if not all(map(len, _all_options(values) or [[]])):
            raise MoeeError(f"values of '{name}'", "none", "pass at least one")
    if is_in_notebook() and not is_headless():
        return _panel(plot, choices, caption or "")
    few = itertools.islice(_combinations(choices, shown or {}), FIGURES)
    return sheet([plot(**choice) for choice in few], caption=caption)


def of_table(plot: Plot, table: pd.DataFrame, **options: Any) -> Plot:
    """Return a plot of the rows of ``table`` whose columns have the values that are chosen."""

    def plot_rows(**choice: Any) -> Figure:
        rows = table[(table[list(choice)] == list(choice.values())).all(axis=1)]
        rows.attrs = {}  # one caption below all
        return plot(rows, **options)

    return plot_rows


def values_of(table: pd.DataFrame, column: str, *, by: str | None = None) -> Values:
    """Values of a column in order of appearance, or of each value of another column, ``by``."""
    for name in filter(None, (column, by)):
        if name not in table:
            expected = f"a column among {', '.join(map(str, table))}"
            raise MoeeError(expected, f"'{name}'", "correct the name")
    if by is None:
        return table[column].unique().tolist()
    groups = table.groupby(by, sort=False)[column]
    return DependsOn(by, {value: part.unique().tolist() for value, part in groups})


def _options(values: Values, chosen: Mapping[str, Any]) -> Sequence[Any]:
    """The options of a choice, once the choices before it are made."""
    if isinstance(values, DependsOn):
        return values.values[chosen[values.other]]
    return range(len(values.names)) if isinstance(values, Pictures) else values


def _all_options(values: Values) -> list[Sequence[Any]]:
    return list(values.values.values()) if isinstance(values, DependsOn) else [_options(values, {})]


# The static grid


def _combinations(choices: Mapping[str, Values], shown: Mapping[str, Sequence]) -> list[Choice]:
    """Choices for the grid: those of ``shown``, or else some evenly spaced ones."""
    for unknown in sorted(set(shown) - set(choices)):
        expected = f"choices among {', '.join(choices)} to be shown"
        raise MoeeError(expected, f"'{unknown}'", "correct it")
    room = FIGURES / math.prod(map(len, shown.values()))
    each = max(1, round(room ** (1 / max(1, len(choices) - len(shown))) - 0.01))
    found: list[Choice] = [{}]
    for name, values in choices.items():
        found = [
            chosen | {name: value}
            for chosen in found
            for value in _few(name, _options(values, chosen), shown.get(name), each)
        ]
    return found


def _few(name: str, options: Sequence[Any], wanted: Sequence[Any] | None, each: int) -> list[Any]:
    if wanted is None:
        count = min(each, len(options))
        return [options[int((place + 0.5) * len(options) / count)] for place in range(count)]
    there = [value for value in wanted if value in options]
    if not there:
        expected = f"values of '{name}' among {', '.join(map(str, list(options)[:8]))}"
        raise MoeeError(expected, ", ".join(map(str, wanted)) or "none", "choose some of them")
    return there


# The panel


class Panel(widgets.VBox):
    """Controls, and the figure that follows them; the first one also for who has no kernel."""

    def _ipython_display_(self) -> None:
        shown = self._repr_mimebundle_()
        del shown["text/plain"]  # of no use to anybody: what shows no widgets shows the still
        display(shown, raw=True)
        display(HTML(f'{STILL}<div class="moee-still">{self.children[-1].value}</div>'))


def _panel(plot: Plot, choices: Mapping[str, Values], caption: str) -> Panel:
    """A control for each choice, and the figure that follows them."""
    controls: dict[str, widgets.Widget] = {}
    screen, drawn, changing = widgets.HTML(), {}, []

    def options_of(values: Values) -> list[tuple[str, Any]]:
        chosen = {name: control.value for name, control in controls.items()}
        return [(str(value), value) for value in _options(values, chosen)]

    def follow(change: Any) -> None:
        changing.append(change)  # several controls change at once, and the figure but once
        for name, values in choices.items():
            if isinstance(values, DependsOn) and controls[values.other] is change.owner:
                control, before = controls[name], controls[name].value
                control.options = options_of(values)
                if before in [value for _, value in control.options]:
                    control.value = before
        changing.pop()

    def draw(**chosen: Any) -> None:
        if changing:
            return
        key = tuple(chosen.values())
        try:
            drawn[key] = drawn.get(key) or _figure_html(plot(**chosen), chosen, caption)
            screen.value = drawn[key]
        except MoeeError as error:
            screen.value = f"<p role='alert'>{escape(str(error))}</p>"

    for name, values in choices.items():
        controls[name] = _make_control(name, values, options_of(values))
        controls[name].observe(follow, names="value")
    boxes = [
        _browser(controls[name], values) if isinstance(values, Pictures) else controls[name]
        for name, values in choices.items()
    ]
    errors = widgets.interactive_output(draw, controls)  # calls it now, and at every change
    return Panel([widgets.HBox(boxes, layout=WRAPPED), errors, screen])


def _make_control(name: str, values: Values, options: list[tuple[str, Any]]) -> widgets.Widget:
    """A slider where all choices are whole numbers in ascending order, always more than one."""
    every = _all_options(values)
    whole = all(isinstance(value, (int, np.integer)) for one in every for value in one)
    slides = whole and all(len(one) > 1 and list(one) == sorted(one) for one in every)
    kind = partial(widgets.SelectionSlider, continuous_update=False) if slides else widgets.Dropdown
    label = name.replace("_", " ").removesuffix(" name")
    look = {"style": {"description_width": "5rem"}, "layout": {"width": "26rem"}}
    return kind(options=options, description=label, **look)


def _browser(slider: widgets.Widget, pictures: Pictures) -> widgets.Widget:
    """Two buttons beside the slider, and the picture that is chosen."""
    count, look = len(pictures.names), widgets.HTML()

    def show(_: Any = None) -> None:
        text = escape(f"{pictures.names[slider.value]}, image {slider.value + 1} of {count}")
        image = Image.fromarray(np.ascontiguousarray(pictures.thumbnails[slider.value]))
        source = data_uri(shrink(image, THUMBNAIL, format="PNG"))
        style = f'height="{THUMBNAIL}" style="vertical-align: middle"'
        look.value = f'<img src="{source}" alt="{text}" {style}> {text}'

    def step(by: int, icon: str, word: str) -> widgets.Button:
        button = widgets.Button(icon=icon, tooltip=f"{word} image", layout={"width": "3rem"})
        button.on_click(lambda _: setattr(slider, "value", (slider.value + by) % count))
        return button

    slider.observe(show, names="value")
    show()
    back, on = step(-1, "arrow-left", "previous"), step(1, "arrow-right", "next")
    return widgets.HBox([back, slider, on, look], layout=WRAPPED)


def _figure_html(fig: Figure, chosen: Mapping[str, Any], caption: str) -> str:
    """``fig`` as HTML that a screen reader can tell, with the caption below."""
    inches = fig.get_size_inches()[0]
    width = round(max(96 * inches, min(fig.dpi * inches, SMALL)))
    choice = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())
    alt = escape(". ".join(filter(None, (fig.get_label(), choice))))
    style = f"max-width: 100%; width: {width}px; background: #fff"
    png = picture(fig, dpi=min(fig.dpi, 1.2 * width / inches))  # few more pixels than are seen
    below = f'<p style="color: var(--jp-ui-font-color2); margin: 0">{escape(caption)}</p>'
    return f'<img src="{data_uri(png)}" alt="{alt}" style="{style}">{below if caption else ""}'
