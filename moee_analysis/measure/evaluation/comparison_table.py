"""The rows of a comparison as a tidy table."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from moee_analysis.measure.routing.load_balance import METRICS

STATIC_FAMILY = "static pruning"
CONTROLS = ("random_routing", "constant_routing", "oracle_routing")


def comparison_table(rows: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """Return the rows of ``compare`` as a tidy table.

    A row for each system, budget and seed: ``system``, ``family``, ``macs_asked``, ``seed``,
    ``top1``, ``dense_top1``, ``retention``, ``retention_low``, ``retention_high``, ``agreement``,
    ``kl``; ``mean``, ``low``, ``high`` (retention over all seeds); ``macs_reduction``,
    ``params_reduction``, ``reduces_macs``; ``speed_up`` over the dense model's time; the metrics of
    ``measure.balance``, means over layers; ``random_routing``, ``constant_routing``,
    ``oracle_routing``, ``static_pruning`` (retention of the controls); ``seconds``, ``reason``.
    What is not known is nan.
    """
    rows = list(rows)
    table = pd.DataFrame([_flat(row) for row in rows])
    table.attrs["caption"] = _caption(rows)
    return table


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    low, high = row["retention_interval"] or (None, None)
    spread, balance = row["over_seeds"] or {}, row["balance"] or {}
    numbers = {
        "top1": row["moe_top1"],
        "dense_top1": row["dense_top1"],
        "retention": row["retention"],
        "retention_low": low,
        "retention_high": high,
        "agreement": row["agreement"],
        "kl": row["kl"],
        **{name: spread.get(name) for name in ("mean", "low", "high")},
        "macs_reduction": row["macs_reduction"],
        "params_reduction": row["params_reduction"],
        "speed_up": (row["latency"] or {}).get("speed_up"),
        **{name: balance.get(name) for name in METRICS},
        **{kind: (found or {}).get("retention") for kind, found in row["controls"].items()},
        "seconds": row["seconds"],
    }
    numbers = {name: np.nan if value is None else float(value) for name, value in numbers.items()}
    named = {name: row[name] for name in ("system", "family", "macs_asked", "seed")}
    return named | numbers | {"reduces_macs": bool(row["reduces_macs"]), "reason": row["reason"]}


def _caption(rows: list[dict[str, Any]]) -> str:
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
