"""The widgets of ``explore`` in JupyterLab."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

import ipywidgets as widgets
import numpy as np
from PIL import Image

from moee_analysis.errors import MoeeError
from moee_analysis.report.explore import DependsOn, Pictures, options_of
from moee_analysis.report.results import picture

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from moee_analysis.report.explore import Plot, Values

_THUMBNAIL = 96  # pixels
_SMALL = 560  # pixels up to which a narrow figure is enlarged
_WIDE = {"width": "26rem"}
_LABEL = {"description_width": "5rem"}
_WRAPPED = {"flex_flow": "row wrap", "align_items": "center"}


def panel(plot: Plot, choices: Mapping[str, Values], caption: str | None) -> widgets.Widget:
    """Return a panel with a control for each choice and the figure that follows them."""
    made = _Panel(plot, choices, caption or "")
    for name in choices:
        made.add(name)
    made.draw()
    controls = [made.boxes[name] for name in choices]
    return widgets.VBox([widgets.HBox(controls, layout=_WRAPPED), made.screen])


@dataclass
class _Panel:
    """The controls, the figure, and what was drawn before."""

    plot: Plot
    choices: Mapping[str, Values]
    caption: str
    controls: dict[str, widgets.Widget] = field(default_factory=dict)
    boxes: dict[str, widgets.Widget] = field(default_factory=dict)
    screen: widgets.HTML = field(default_factory=widgets.HTML)
    drawn: dict[tuple[Any, ...], str] = field(default_factory=dict)
    waiting: bool = False  # several controls change at once

    def add(self, name: str) -> None:
        """Make the control of a choice, which those before it may decide."""
        values = self.choices[name]
        options = options_of(values, self.chosen())
        self.controls[name] = control = _control(name, options, ordered=_is_scale(values))
        self.boxes[name] = _browser(control, values) if isinstance(values, Pictures) else control
        control.observe(lambda _: self.follow(name), names="value")

    def chosen(self) -> dict[str, Any]:
        """Return what the controls say."""
        return {name: control.value for name, control in self.controls.items()}

    def follow(self, changed: str) -> None:
        """Give the choices that depend on ``changed`` their new values, then draw."""
        if self.waiting:
            return
        self.waiting = True
        try:
            for name, values in self.choices.items():
                if isinstance(values, DependsOn) and values.other == changed:
                    _offer(self.controls[name], options_of(values, self.chosen()))
        finally:
            self.waiting = False
        self.draw()

    def draw(self) -> None:
        """Show the figure of what is chosen."""
        chosen = self.chosen()
        key = tuple(chosen.values())
        if key not in self.drawn:
            try:
                self.drawn[key] = _shown(self.plot(**chosen), _told(chosen), self.caption)
            except MoeeError as error:
                self.screen.value = f"<p role='alert'>{escape(str(error))}</p>"
                return
        self.screen.value = self.drawn[key]


def _is_scale(values: Values) -> bool:
    """Whether all that can be chosen are whole numbers in ascending order, always more than one."""
    every = values.values.values() if isinstance(values, DependsOn) else [options_of(values, {})]
    whole = all(isinstance(value, (int, np.integer)) for one in every for value in one)
    return whole and all(len(one) > 1 and list(one) == sorted(one) for one in every)


def _control(name: str, options: Any, *, ordered: bool) -> widgets.Widget:
    """A slider for what is ordered, a list for everything else."""
    kind = widgets.SelectionSlider if ordered else widgets.Dropdown
    extra = {"continuous_update": False} if ordered else {}
    return kind(
        options=_labelled(options), description=name.replace("_", " ").removesuffix(" name"),
        style=_LABEL, layout=_WIDE, **extra,
    )  # fmt: skip


def _offer(control: widgets.Widget, options: Any) -> None:
    """Give a control other options, and keep its value where that is still one of them."""
    before = control.value
    control.options = _labelled(options)
    if before in options:
        control.value = before


def _labelled(options: Any) -> list[tuple[str, Any]]:
    return [(str(value), value) for value in options]


def _browser(slider: widgets.Widget, pictures: Pictures) -> widgets.Widget:
    """Two buttons beside the slider, and the picture that is chosen."""
    look = widgets.HTML()

    def show(_: Any = None) -> None:
        name, place = pictures.names[slider.value], slider.value
        told = f"{name}, image {place + 1} of {len(pictures)}"
        look.value = (
            f'<img src="{_uri(_small(pictures.thumbnails[place]))}" height="{_THUMBNAIL}" '
            f'alt="{escape(told)}" style="vertical-align: middle"> {escape(told)}'
        )

    def step(by: int) -> widgets.Button:
        word, icon = ("next", "arrow-right") if by > 0 else ("previous", "arrow-left")
        button = widgets.Button(
            icon=icon, tooltip=f"{word} image", layout={"width": "3rem"}, description=""
        )
        button.on_click(lambda _: _move(slider, by, len(pictures)))
        return button

    slider.observe(show, names="value")
    show()
    return widgets.HBox([step(-1), slider, step(1), look], layout=_WRAPPED)


def _move(slider: widgets.Widget, by: int, count: int) -> None:
    slider.value = (slider.value + by) % count


def _small(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _told(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in chosen.items())


def _shown(fig: Figure, told: str, caption: str) -> str:
    """``fig`` as HTML that a screen reader can tell, with the caption below."""
    inches = fig.get_size_inches()[0]
    width = round(max(96 * inches, min(fig.dpi * inches, _SMALL)))
    below = f'<p style="color: var(--jp-ui-font-color2); margin: 0">{escape(caption)}</p>'
    told = ". ".join(text for text in (fig.get_label(), told) if text)
    return (
        f'<img src="{_uri(picture(fig))}" alt="{escape(told)}" '
        f'style="max-width: 100%; width: {width}px; background: #fff">{below if caption else ""}'
    )


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"
