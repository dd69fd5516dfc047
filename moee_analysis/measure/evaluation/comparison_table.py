"""One system of a comparison as plain numbers for a file, and all of them as a table."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from moee_analysis.extraction.pipeline import Extraction
from moee_analysis.measure.evaluation.accuracy import summarised
from moee_analysis.measure.routing.load_balance import METRICS, balance_metrics
from moee_analysis.models.macs import MacCount, count_parameters
from moee_analysis.moe.expert_layer import expert_layers, macs_as_used
from moee_analysis.moe.layer import MoeMlp

Row = dict[str, Any]

STATIC_FAMILY = "static pruning"
CONTROLS = ("random_routing", "constant_routing", "oracle_routing")
_ACCURACY = (
    "dense_top1", "moe_top1", "moe_top1_interval", "moe_top5", "retention", "retention_interval",
    "agreement", "kl",
)  # fmt: skip
_COSTS = ("macs_moe", "macs_reduction", "reduces_macs", "params_moe", "params_reduction")


def comparison_table(rows: Iterable[Row]) -> pd.DataFrame:
    """Return the rows of ``compare`` as a tidy table.

    Returns
    -------
    DataFrame
        A row for each system, budget and seed: ``system``, ``family``, ``macs_asked``, ``seed``,
        ``top1``, ``dense_top1``, ``retention``, ``retention_low``, ``retention_high``,
        ``agreement``, ``kl``; ``mean``, ``low``, ``high`` (retention over all seeds);
        ``macs_reduction``, ``params_reduction``, ``reduces_macs``; ``speed_up`` over the dense
        model's time; the metrics of ``measure.balance``, means over layers; ``random_routing``,
        ``constant_routing``, ``oracle_routing``, ``static_pruning`` (retention of the controls);
        ``seconds``, ``reason``. What is not known is nan.
    """
    rows = list(rows)
    table = pd.DataFrame([_flat(row) for row in rows])
    table.attrs["caption"] = _caption(rows)
    return table


def told_of(scores: Mapping[Hashable, Any], *, resamples: int) -> dict[Hashable, Row]:
    """Sum up scores of every image, by system."""
    table = summarised(scores, seed=0, resamples=resamples)
    return {row["system"]: row for row in table.to_dict("records")}


def accuracy_of(name: str, told: Mapping[Hashable, Row]) -> Row:
    """Accuracy of a system and of its controls; None is what is not known or not defined."""
    own = told.get((name, "own"))
    controls = {kind: _control(told.get((name, kind))) for kind in CONTROLS}
    return (dict.fromkeys(_ACCURACY) if own is None else _numbers(own)) | {"controls": controls}


def costs_of(
    model: nn.Module | None, dense: nn.Module, counted: MacCount, usage: Mapping[str, torch.Tensor]
) -> Row:
    """MACs as experts were used, and parameters, of ``model`` and of the dense one."""
    known = {"macs_dense": float(counted.total), "params_dense": count_parameters(dense)}
    if model is None:
        return known | dict.fromkeys(_COSTS)
    macs, parameters = macs_as_used(model, usage), count_parameters(model)
    saved = 1 - macs / counted.total
    reduced = 1 - parameters / known["params_dense"]
    return known | dict(
        zip(_COSTS, (float(macs), saved, saved > 0, parameters, reduced), strict=True)
    )


def balance_of(usage: Mapping[str, torch.Tensor]) -> dict[str, float] | None:
    """Metrics of ``measure.balance``, means over layers; None where there is nothing to route."""
    layers = [balance_metrics(used.numpy()) for used in usage.values() if len(used) > 1]
    if not layers:
        return None
    return {name: float(np.mean([layer[name] for layer in layers])) for name in METRICS}


def best_static(rows: Iterable[Row]) -> Row | None:
    """The static system among ``rows`` that keeps most, as a control of the others."""
    known = [r for r in rows if r["family"] == STATIC_FAMILY and r["retention"] is not None]
    if not known:
        return None
    best = max(known, key=lambda row: row["retention"])
    return {"system": best["system"]} | {name: best[name] for name in _ACCURACY if name in best}


def layers_of(made: Extraction | nn.Module) -> tuple[Row, ...]:
    """What each layer has become; only an extraction knows of noise, and of layers left dense."""
    if isinstance(made, Extraction):
        return tuple(asdict(layer) for layer in made.layers)
    return tuple(_layer(name, layer) for name, layer in expert_layers(made).items())


def _layer(name: str, layer: nn.Module) -> Row:
    row = {"name": name, "experts": layer.n_experts, "converted": True, "reason": ""}
    row |= {"noise_share": None, "active_fraction": None, "union_fraction": None}
    if isinstance(layer, MoeMlp):
        active = torch.dot(layer.shares.double(), layer.sizes.double()).item()
        row["active_fraction"] = active / layer.hidden_dense
        row["union_fraction"] = len(layer.kept) / layer.hidden_dense
    return row


def _numbers(row: Row) -> Row:
    """A row of ``measure.accuracy`` in the words of ``moee evaluate``."""
    values = {
        "dense_top1": row["reference_top1"],
        "moe_top1": row["top1"],
        "moe_top1_interval": [row["low"], row["high"]],
        "moe_top5": row["top5"],
        "retention": row["retention"],
        "retention_interval": [row["retention_low"], row["retention_high"]],
        "agreement": row["agreement"],
        "kl": row["kl"],
    }
    return {name: _plain(value) for name, value in values.items()}


def _control(row: Row | None) -> Row | None:
    if row is None:
        return None
    return {name.removeprefix("moe_"): value for name, value in _numbers(row).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(each) for each in value]
    return float(value) if math.isfinite(value) else None


def _flat(row: Row) -> dict[str, Any]:
    low, high = row["retention_interval"] or (None, None)
    spread = row["over_seeds"] or {}
    controls = {kind: (found or {}).get("retention") for kind, found in row["controls"].items()}
    numbers = {
        "top1": row["moe_top1"],
        **{name: row[name] for name in ("dense_top1", "retention")},
        "retention_low": low,
        "retention_high": high,
        **{name: row[name] for name in ("agreement", "kl")},
        **{name: spread.get(name) for name in ("mean", "low", "high")},
        **{name: row[name] for name in ("macs_reduction", "params_reduction")},
        "speed_up": (row["latency"] or {}).get("speed_up"),
        **{name: (row["balance"] or {}).get(name) for name in METRICS},
        **controls,
        "seconds": row["seconds"],
    }
    numbers = {name: np.nan if value is None else float(value) for name, value in numbers.items()}
    named = {name: row[name] for name in ("system", "family", "macs_asked", "seed")}
    return named | numbers | {"reduces_macs": bool(row["reduces_macs"]), "reason": row["reason"]}


def _caption(rows: list[Row]) -> str:
    seeds = {row["seed"] for row in rows}
    times = [row["latency"] for row in rows if row["latency"]]
    timed = (
        f"; times of batches of {times[0]['batch_size']} with {times[0]['threads']} threads"
        if times else ""
    )  # fmt: skip
    several = "s" * (len(seeds) > 1)
    return (
        f"{rows[0]['n_images'] if rows else 0} images evaluated, reference: the dense model; "
        f"{len(seeds)} seed{several}, bars are 95 % intervals of a bootstrap of images and seeds; "
        f"MACs as experts are used on these images, routers included{timed}."
    )
