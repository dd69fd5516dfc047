"""One run against its dense model, as plain numbers for a file."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd

from moee_analysis.baselines.controls import randomly_routed
from moee_analysis.data.disjoint import OTHERS, check_unused
from moee_analysis.data.images import ImageSet
from moee_analysis.errors import MoeeError
from moee_analysis.extraction.run import Extraction
from moee_analysis.measure.evaluation.accuracy import accuracy
from moee_analysis.measure.evaluation.mac_table import macs
from moee_analysis.models.loading import check_device
from moee_analysis.utils.progress import tell_progress

ACCURACY = {
    "dense_top1": ["reference_top1"], "moe_top1": ["top1"], "moe_top1_interval": ["low", "high"],
    "moe_top5": ["top5"], "retention": ["retention"],
    "retention_interval": ["retention_low", "retention_high"], "agreement": ["agreement"],
    "kl": ["kl"],
}  # fmt: skip
"""The columns of ``measure.accuracy`` behind each of :func:`accuracy_numbers`."""


def evaluate(
    run: Extraction, images: ImageSet, *, weights: str | Path | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Accuracy, MACs and parameters of a run and its dense model on the same images.

    MACs are those of one image, with the routing shares measured on ``images``; ``macs_unread`` are
    spent on tokens that nothing reads, in the modules ``unread_sites``, ``macs_reduction_read`` is
    saved of all others. ``macs_merging`` are spent on finding tokens that merge; ``macs_saved`` are
    those that each stage saves: merging (what it spends taken off), then smaller heads and experts
    on the tokens that are left. What is not defined (retention of nothing) is None.
    """
    check_device(device)
    check_unseen(run, images)
    dense = run.dense(weights=weights).to(device)
    tell_progress(f"comparing with the dense model on {len(images)} images")
    systems = {"moe": run.model.to(device), "random": randomly_routed(run)}
    scores = accuracy(systems, images, reference=dense).set_index("system")
    tell_progress("counting MACs as the experts are used")
    costs = macs(run, images)
    cost = costs.set_index("component").loc["total"]
    read = cost[["macs", "macs_dense"]] - cost[["macs_unread", "macs_unread_dense"]].to_numpy()
    return {
        **accuracy_numbers(scores.loc["moe"]),
        "random_routing_top1": float(scores.loc["random", "top1"]),
        "macs_dense": float(cost["macs_dense"]),
        "macs_moe": float(cost["macs"]),
        "macs_reduction": 1 - float(cost["macs"] / cost["macs_dense"]),
        **_describe_stages(costs),
        "macs_unread_dense": float(cost["macs_unread_dense"]),
        "macs_unread_moe": float(cost["macs_unread"]),
        "macs_reduction_read": 1 - float(read["macs"] / read["macs_dense"]),
        "unread_sites": costs.attrs["unread_sites"],
        "params_dense": int(cost["params_dense"]),
        "params_moe": int(cost["params"]),
        "params_reduction": 1 - float(cost["params"] / cost["params_dense"]),
        "n_images": len(images),
        "skipped_images": list(images.skipped),
        "variance_kept": run.variance_kept,
        "layers": [asdict(layer) for layer in run.layers],
        "provenance": _without_contents(run.provenance),
    }


def _describe_stages(costs: pd.DataFrame) -> dict[str, Any]:
    """MACs that merging spends, and that each stage saves; the latter add up to all that is."""
    rows = costs[costs["component"] != "total"]
    merging = float(rows.loc[rows["component"] == "merging", "macs"].sum())
    saved = (rows["macs_left"] - rows["macs"]).groupby(rows["layer"] >= 0).sum()
    return {
        "macs_merging": merging,
        "macs_saved": {
            "merging": float((rows["macs_dense"] - rows["macs_left"]).sum()) - merging,
            "attention": float(saved[False]) + merging,
            "experts": float(saved[True]),
        },
    }


def accuracy_numbers(row: Mapping[str, float]) -> dict[str, Any]:
    """A row of ``measure.accuracy`` in the words of ``moee evaluate``; None is not defined."""
    found = {}
    for name, columns in ACCURACY.items():
        values = [float(row[each]) if math.isfinite(row[each]) else None for each in columns]
        found[name] = values if len(values) > 1 else values[0]
    return found


def check_unseen(run: Extraction, images: ImageSet) -> None:
    """Refuse to evaluate a run on pictures, by content, that it was calibrated or fine-tuned on.

    Of a run that was saved before contents were kept it is known only of the whole set.
    """
    uses = [(run.provenance, "used for calibration")]
    uses += [(tuning, "trained on") for tuning in run.provenance.get("finetunings", [])]
    for facts, use in uses:
        if "contents" in facts:
            check_unused(facts["contents"], images, use=use)
        elif facts["images_sha256"] == images.fingerprint:
            raise MoeeError(f"images to evaluate that are not {use}", "the same set", OTHERS)


def _without_contents(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts of a run without the hashes of all pictures, which nobody reads."""
    shown = {key: value for key, value in facts.items() if key != "contents"}
    if "finetunings" in shown:
        shown["finetunings"] = [_without_contents(each) for each in shown["finetunings"]]
    return shown
