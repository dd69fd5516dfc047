"""The workbench of a notebook: its model and images, and the place of its findings."""

import difflib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.figure import Figure
from torch import nn

from moee_analysis import measure as measures
from moee_analysis import plots
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.config import MACS_REDUCTION, ExtractConfig, Preset, preset_named
from moee_analysis.extraction.pipeline import extract
from moee_analysis.extraction.run import Extraction
from moee_analysis.models import loading as models
from moee_analysis.models.class_names import is_classifier, name_by_folders
from moee_analysis.models.macs import count
from moee_analysis.outside_text import as_markdown
from moee_analysis.report.notebook import results as findings
from moee_analysis.report.notebook.parameters import ImageSets, Parameters, choose_images
from moee_analysis.report.notebook.remember import remember, remembering
from moee_analysis.utils.environment import describe_device, store_folder, versions
from moee_analysis.utils.storage.store import check_writable

VERDICTS = {  # words for a verdict, and the class that colours them on the report's pages
    True: ("✓ holds", "good"),
    False: ("✗ does not hold", "bad"),
    None: ("◐ holds in part", "half"),
}


@dataclass(frozen=True)
class Bench:
    """One notebook's model, images, extraction and results, each made when first asked for.

    ``device`` is the dense model's: ``"cuda"`` where there is one, else ``"cpu"``.
    """

    parameters: Parameters
    results: findings.Results
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
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
        """The store, in which later notebooks find what this one has computed."""
        return store_folder()

    @cached_property
    def dense(self) -> nn.Module:
        """The model as it was trained."""
        given = self.parameters
        model = models.load_model(given.model, device=self.device, **given.model_arguments)
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
        """Share of all MACs to save: the paper's, or 60 % of the MLPs' where that is less."""
        counted = count(self.dense)
        in_mlps = sum(counted.by_module[name] for name in counted.tokens)
        return min(MACS_REDUCTION, round(0.6 * in_mlps / counted.total, 3))

    @cached_property
    def run(self) -> Extraction:
        """MoEE as published, with this :attr:`saving`; computed once, then found in the store."""
        given = {"preset": self.parameters.preset, "seed": self.seed}
        config = ExtractConfig(recipe="paper", macs_reduction=self.saving, **given)
        return extract(self.dense, self.calibration, config, store=self.store)

    @property
    def measure(self) -> SimpleNamespace:
        """All measures; what one has measured before, with the same code, is in the store."""
        return remembering(measures, self.store)

    def remember(self, measure: Callable[..., Any], *given: Any, **options: Any) -> Any:
        """Return what ``measure`` returns, such as a comparison; see :attr:`measure`."""
        return remember(self.store, measure, *given, **options)

    def choose_layers(self, default: Sequence[int]) -> list[int]:
        """Return the layers to show: the parameter ``layers``, or ``default`` if it is empty."""
        layers, count = list(self.parameters.layers or default), len(models.find_mlps(self.dense))
        beyond = [layer for layer in layers if layer >= count]
        if beyond:
            expected = f"layers from 0 to {count - 1} of this model"
            raise MoeeError(expected, str(beyond), "correct 'layers'")
        return layers

    def choose_among(self, preferred: Sequence[str], *, count: int) -> list[int]:
        """Return class indices to show: the parameter ``classes``, or ``count`` of the images' own.

        Of these, those of ``preferred`` come first.
        """
        if self.parameters.classes:
            return list(map(self._index_of, self.parameters.classes))
        labels = models.class_labels(self.dense)
        shown = list(dict.fromkeys(self.images.labels(self.dense).tolist()))
        liked = [index for name in preferred for index in shown if labels[index] == name]
        return list(dict.fromkeys([*liked, *shown]))[:count]

    def _index_of(self, wanted: int | str) -> int:
        """The index of a class that is given by it, by its name (wnid) or by its readable name."""
        names, labels = models.class_names(self.dense), models.class_labels(self.dense)
        if wanted in range(len(names)):
            return int(wanted)
        for known in (names, labels):
            if wanted in known:
                return known.index(wanted)
        close = difflib.get_close_matches(str(wanted), [*labels, *names], n=3)
        meant = f"did you mean {', '.join(close)}" if close else f"such as '{labels[0]}'"
        expected = f"one of the model's {len(names)} classes, by name or index"
        raise MoeeError(expected, repr(wanted), meant)

    def record(self, key: str, value: Any) -> None:
        """Keep a number (or text, list, mapping) as ``values.<key>``; NaN is kept as null."""
        self.results.put_into("values", key, value)

    def table(self, name: str, table: pd.DataFrame) -> pd.DataFrame:
        """Keep ``table`` as ``tables/<name>.csv`` and return it, to be shown."""
        facts = {"rows": len(table), "columns": list(map(str, table.columns))}
        facts["caption"] = table.attrs.get("caption") or None
        content = table.to_csv(index=not findings.is_plain_index(table)).encode()
        self.results.keep("tables", name, "csv", content, **facts)
        return table

    def figure(
        self, name: str, fig: Any, *, finding: str = "", caption: str = "", cover: bool = False
    ) -> Any:
        """Keep ``fig`` as ``figures/<name>.png`` and return it, to be shown.

        A screen reader says the ``finding``, else the label that the figure has, then the
        ``caption``. The ``cover`` stands for the notebook on the report's index, else the first
        figure. Anything but a figure, such as a panel of widgets, is returned and not kept.
        """
        if not isinstance(fig, Figure):
            return fig
        facts = {"finding": finding or fig.get_label() or None, "caption": caption or None}
        fig.set_label(findings.alt_text(facts) or name.replace("_", " "))
        content = findings.picture(fig)
        self.results.keep("figures", name, "png", content, **facts, cover=cover or None)
        return fig

    def draw(self, plot: Callable[..., Figure], *given: Any, **options: Any) -> Figure:
        """Return a ``plot`` of what is ``given``, with its finding as label; it is not kept."""
        facts = {"finding": plots.describe(plot, *given), "caption": options.get("caption")}
        fig = plot(*given, **options)
        fig.set_label(findings.alt_text(facts))
        return fig

    def show(
        self, name: str, plot: Callable[..., Figure], table: pd.DataFrame, *, cover: bool = False,
        options: Mapping[str, Any] | None = None, **facts: Any,
    ) -> Figure:  # fmt: skip
        """Keep ``table`` and the figure that ``plot`` makes of it; return the figure, to be shown.

        ``facts`` are those of :meth:`caption`, which stands below the figure, before the table's
        own; ``options`` go to ``plot``.
        """
        finding, caption = plots.describe(plot, table), self.caption(**facts)
        below = ". ".join(filter(None, (caption, table.attrs.get("caption"))))
        fig = plot(self.table(name, table), caption=below, **(options or {}))
        return self.figure(name, fig, finding=finding, caption=caption, cover=cover)

    def headline(self, label: str, value: float | str, *, dense: str, form: str = "") -> Markdown:
        """Keep and show the one number that sums the notebook up, beside the ``dense`` model's.

        ``form`` is how it is written, as in ``".1%"``; a gate compares the number itself.
        """
        shown, number = format(value, form) if form else value, findings.plain(value)
        exact = {"number": number} if isinstance(number, (int, float)) else {}
        self.results.put("headline", {"label": label, "value": shown, "dense": dense} | exact)
        return Markdown(findings.in_words(self.results.content["headline"]))

    def claim(
        self, statement: str, found: str, holds: bool | None, *, ours: bool = False,  # noqa: FBT001
    ) -> Markdown:  # fmt: skip
        """Keep and show a claim of the paper, or of ``ours``; None holds in part."""
        verdict, colour = VERDICTS[holds]
        claim = {"statement": statement, "found": found, "holds": holds, "verdict": verdict}
        self.results.append("claims", claim | {"ours": ours})
        return Markdown(
            f"> **{'Tested here' if ours else 'The paper says'}** {as_markdown(statement)}\n>\n"
            f"> **Found here** {as_markdown(found)}\n>\n"
            f'> <strong class="{colour}">{verdict}</strong>'
        )

    def answer(self, text: str) -> Markdown:
        """Show what the solution of an exercise found; it is not kept in the results."""
        return Markdown(as_markdown(text))

    def caption(
        self, *, layer: int | None = None, site: str = "", tokens: str = "", n: int | None = None
    ) -> str:
        """Say which layer, site, tokens, number of images, model and seed a figure shows."""
        facts = [
            f"layer {layer}" if layer is not None else "",
            site,
            f"{tokens} tokens" if tokens else "",
            f"n = {findings.readable(n)} images" if n is not None else "",
            f"model {self.parameters.model}, preset {self.parameters.preset}, seed {self.seed}",
        ]
        return ", ".join(filter(None, facts)) + " (layers counted from 0)"

    def finish(self) -> Markdown:
        """Show what was found, in three lines; keep and show versions, device and time: the end."""
        facts = {
            "device": describe_device(self.device),
            "cores": os.cpu_count(),
            "seconds": round(time.monotonic() - self.started, 1),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.results.put("environment", facts | {"versions": versions()})
        given = {k: v for k, v in self.results.content["parameters"].items() if v not in (None, [])}
        for name, values in {"parameters": given, "versions": versions()}.items():
            # the line breaks between the facts only
            facts[name] = ", ".join(f"{key}\u00a0{value}" for key, value in values.items())
        found = "\n".join(f"- {line}" for line in self.results.summary())
        return Markdown("\n\n".join(["## What was found", found, findings.two_columns(facts)]))

    @cached_property
    def _image_sets(self) -> ImageSets:
        sets = choose_images(self.parameters)
        self.results.put("images", sets.summary())
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
            "device": describe_device(self.device),
        }
        notes = "".join(f"\n\n*{as_markdown(note)}*" for note in sets.notes)
        return findings.two_columns(rows) + notes


def open_notebook(name: str, *, out: str | None = None, **parameters: Any) -> Bench:
    """Check a notebook's ``parameters`` and set up its workbench.

    ``name`` is the notebook's file name without its suffix; ``results.json``, ``tables/`` and
    ``figures/`` go to the folder ``out``, None writes nothing.
    """
    given = Parameters(**parameters, out=out)
    findings.prepare_display()
    results = findings.Results(None if out is None else Path(out))
    results.put("notebook", name)
    results.put("parameters", {key: value for key, value in asdict(given).items() if key != "out"})
    return Bench(given, results)


def check_report(parameters: Mapping[str, Any]) -> None:
    """Refuse a store, model, images, layers or classes that no notebook could run with."""
    given = Parameters(**parameters)
    check_writable(store_folder())
    bench = Bench(given, findings.Results(), device="cpu")
    bench.choose_layers(())
    if is_classifier(bench.dense):
        bench.choose_among((), count=1)
