"""The workbench of a notebook: what it looks at, and where its findings go."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure
from torch import nn

from moee_analysis import findings
from moee_analysis.data.images import ImageSet
from moee_analysis.extraction.config.presets import Preset, preset_named
from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.models import loading as models
from moee_analysis.models.class_names import name_by_folders
from moee_analysis.models.macs import count
from moee_analysis.outside_text import as_markdown
from moee_analysis.report.notebook.choices import checked_layers, class_index, liked_first
from moee_analysis.report.notebook.display import is_figure, markdown, prepare_display, two_columns
from moee_analysis.report.notebook.image_sets import ImageSets, choose_images
from moee_analysis.report.notebook.parameters import Parameters
from moee_analysis.report.notebook.text import (
    VERDICTS,
    caption_text,
    claim_text,
    headline_text,
    listed,
)
from moee_analysis.report.results import Results, alternative, picture
from moee_analysis.utils import versions as environment
from moee_analysis.utils.paths import store_folder

MACS_REDUCTION = 0.28
"""Share of the dense model's MACs that the notebooks' extraction saves at most, as in the paper."""


@dataclass(frozen=True)
class Bench:
    """One notebook's model, images, extraction and results.

    Everything is loaded or computed when it is first asked for, and then kept.
    """

    name: str
    parameters: Parameters
    results: Results
    started: float = field(default_factory=time.monotonic)

    @property
    def preset(self) -> Preset:
        """The numbers behind the preset's name."""
        return preset_named(self.parameters.preset)

    @property
    def seed(self) -> int:
        """Seed of the token sample, the embedding and the bootstrap."""
        return self.parameters.seed

    @property
    def store(self) -> Path:
        """Folder in which later notebooks find what this one computed."""
        return store_folder()

    @property
    def device(self) -> str:
        """Where the dense model is: ``"cuda"`` where there is one, else ``"cpu"``."""
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def dense(self) -> nn.Module:
        """The model as it was trained."""
        given = self.parameters
        model = models.load_model(
            given.model, weights=given.weights, device=self.device, classes=given.class_file,
            img_size=given.img_size, in_chans=given.in_chans,
        )  # fmt: skip
        name_by_folders(model, self.images.classes)
        return model

    @property
    def calibration(self) -> ImageSet:
        """The images the experts are made from; never evaluated."""
        return self._image_sets.calibration

    @property
    def images(self) -> ImageSet:
        """The images the model is looked at with; never used for calibration."""
        return self._image_sets.evaluation

    @property
    def training(self) -> ImageSet:
        """Images to fine-tune with, never evaluated: scenes of their own, or the calibration's."""
        return self._image_sets.training

    @cached_property
    def saving(self) -> float:
        """Share of all MACs to save: :data:`MACS_REDUCTION`, or 60 % of what the MLPs spend."""
        counted = count(self.dense)
        in_mlps = sum(counted.by_module[name] for name in counted.tokens)
        return min(MACS_REDUCTION, round(0.6 * in_mlps / counted.total, 3))

    @cached_property
    def run(self) -> Extraction:
        """MoEE as published, with this :attr:`saving`; computed once, then found in the store."""
        from moee_analysis.extraction.pipeline import ExtractConfig, extract

        config = ExtractConfig(
            recipe="paper",
            macs_reduction=self.saving,
            preset=self.parameters.preset,
            seed=self.seed,
        )
        return extract(self.dense, self.calibration, config, store=self.store)

    def choose_layers(self, default: Sequence[int]) -> list[int]:
        """Return the layers to show: the parameter ``layers``, or ``default`` if it is empty.

        Raises
        ------
        MoeeError
            A layer the model does not have.
        """
        return checked_layers(self.dense, self.parameters.layers or default)

    def choose_classes(self, default: Sequence[int | str]) -> list[int]:
        """Return the model's class indices to show: the parameter ``classes``, or ``default``.

        A class may be given by index, by name (wnid) or by readable name.

        Raises
        ------
        MoeeError
            A class the model does not know.
        """
        return [class_index(self.dense, c) for c in (self.parameters.classes or default)]

    def choose_among(self, preferred: Sequence[str], *, count: int) -> list[int]:
        """Return class indices to show: the parameter ``classes``, or ``count`` of the images' own.

        Those of ``preferred`` that the images show come first, then others of the images.
        """
        if self.parameters.classes:
            return self.choose_classes(())
        present = self.images.labels(self.dense).tolist()
        return liked_first(self.dense, present, preferred, count)

    def record(self, key: str, value: Any) -> None:
        """Keep a number (or text, list, mapping) as ``values.<key>``; NaN is kept as null."""
        self.results.put_into("values", key, value)

    def table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Keep ``table`` as ``tables/<name>.csv`` and return it, to be shown."""
        self.results.table(name, table)
        return table

    def figure(
        self,
        name: str,
        fig: Figure | Any,
        *,
        finding: str | None = None,
        caption: str | None = None,
        cover: bool = False,
    ) -> Any:
        """Keep ``fig`` as ``figures/<name>.png`` and return it, to be shown.

        The ``finding`` says in a sentence or two what is to be seen, such as what a function of
        ``moee_analysis.findings`` tells; without one it is the label that the figure has. A screen
        reader says it, and then the ``caption``. The ``cover`` figure stands for the notebook on
        the report's index; without one the first figure does.

        Something else than a figure, such as a panel of widgets, is returned as it is, not kept.
        """
        if not is_figure(fig):
            return fig
        told = {"finding": finding or fig.get_label(), "caption": caption}
        self.results.figure(name, picture(fig), told, cover=cover)
        fig.set_label(alternative(told) or name.replace("_", " "))
        return fig

    def draw(self, plot: Callable[..., Figure], *given: Any, **options: Any) -> Figure:
        """Return the figure that ``plot`` makes of what is ``given``, with its finding as label.

        It is not kept: for the solutions of exercises, and to look at something in passing.
        """
        told = {"finding": findings.of(plot)(*given), "caption": options.get("caption")}
        fig = plot(*given, **options)
        fig.set_label(alternative(told))
        return fig

    def show(
        self,
        name: str,
        plot: Callable[..., Figure],
        table: pd.DataFrame,
        *,
        cover: bool = False,
        options: Mapping[str, Any] | None = None,
        **facts: Any,
    ) -> Figure:
        """Keep ``table`` and the figure that ``plot`` makes of it; return the figure, to be shown.

        ``facts`` are those of :meth:`caption`, which is written below the figure, with what the
        measure says of its table; ``options`` go to ``plot``. What is to be seen says the plot's
        twin in ``moee_analysis.findings``.

        Raises
        ------
        MoeeError
            The plot has no such twin.
        """
        finding = findings.of(plot)(table)
        caption = self.caption(**facts)
        told = ". ".join(part for part in (caption, table.attrs.get("caption")) if part)
        fig = plot(self.table(name, table), caption=told, **(options or {}))
        return self.figure(name, fig, finding=finding, caption=caption, cover=cover)

    def headline(self, label: str, value: float | str, *, dense: str) -> Markdown:
        """Keep the one number that sums the notebook up, for the report's index; show it.

        ``dense`` is what the dense model comes to, or its counterpart where it has no such number.
        """
        self.results.put("headline", {"label": label, "value": value, "dense": dense})
        return markdown(headline_text(label, value, dense))

    def claim(
        self,
        statement: str,
        found: str,
        holds: bool | None,  # noqa: FBT001
        *,
        ours: bool = False,
    ) -> Markdown:
        """Keep and show a claim of the paper, what was found here, and whether it holds.

        ``holds`` is True, False, or None for a claim that holds in part; ``ours`` marks a claim of
        this project's, of which the paper says nothing.
        """
        kept = {"statement": statement, "found": found, "holds": holds}
        self.results.append("claims", kept | {"verdict": VERDICTS[holds][0], "ours": ours})
        source = "Tested here" if ours else "The paper says"
        return markdown(claim_text(statement, found, holds, source))

    def answer(self, text: str) -> Markdown:
        """Show what the solution of an exercise found; it is not kept in the results."""
        return markdown(as_markdown(text))

    def caption(
        self,
        *,
        layer: int | None = None,
        site: str | None = None,
        tokens: str | None = None,
        n: int | None = None,
    ) -> str:
        """Say which layer, site, tokens, number of images, model and seed a figure shows."""
        given = self.parameters
        run = {"model": given.model, "preset": given.preset, "seed": self.seed}
        return caption_text(layer, site, tokens, n, run)

    def finish(self) -> Markdown:
        """Keep and show versions, device, time and parameters; a notebook's last cell."""
        facts = {
            "device": environment.describe_device(self.device),
            "cores": os.cpu_count(),
            "seconds": round(time.monotonic() - self.started, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        versions = environment.versions()
        self.results.put("environment", facts | {"versions": versions})
        given = {k: v for k, v in self.parameters.told().items() if v not in (None, [])}
        return markdown(
            two_columns({**facts, "parameters": listed(given), "versions": listed(versions)})
        )

    @cached_property
    def _image_sets(self) -> ImageSets:
        sets = choose_images(self.parameters)
        self.results.put("images", sets.told())
        for note in sets.notes:
            self.results.append("notes", note)
        return sets

    def _repr_markdown_(self) -> str:
        """What this notebook looks at, for the cell that opens it."""
        sets = self._image_sets
        rows = {
            "model": self.parameters.model,
            "calibration": f"{sets.calibration.name} ({len(sets.calibration)} images)",
            "images": f"{sets.evaluation.name} ({len(sets.evaluation)} images)",
            "preset": self.parameters.preset,
            "seed": self.seed,
            "device": environment.describe_device(self.device),
        }
        return two_columns(rows) + "".join(f"\n\n*{as_markdown(note)}*" for note in sets.notes)


def open_notebook(name: str, *, out: str | None = None, **parameters: Any) -> Bench:
    """Check a notebook's parameters and set up its workbench.

    Parameters
    ----------
    name
        The notebook's file name without its suffix.
    out
        Folder for ``results.json``, ``tables/`` and ``figures/``; None writes nothing.
    parameters
        The other lines of the parameters cell, see
        ``Parameters``.

    Raises
    ------
    MoeeError
        A parameter of the wrong type or out of range.
    """
    given = Parameters(**parameters, out=out)
    prepare_display()
    kept = Results(None if out is None else Path(out))
    kept.put("notebook", name)
    kept.put("parameters", given.told())
    return Bench(name, given, kept)
