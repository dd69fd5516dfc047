"""The text that the command line prints."""

import math
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pandas as pd

from moee_analysis.extraction.run import Extraction
from moee_analysis.models.attention import reduced_attentions
from moee_analysis.models.merging import merging_blocks
from moee_analysis.outside_text import printable
from moee_analysis.training.finetune import Finetuned
from moee_analysis.utils.environment import nearest_folder
from moee_analysis.utils.storage.refusals import bytes_text
from moee_analysis.utils.storage.upkeep import KINDS, OTHER_KINDS, Entry, shares

TINY = 1e-9  # a share that rounding leaves


def layers_text(run: Extraction) -> str:
    """Each layer of a run: its experts and their sizes, or why it stayed dense."""
    lines = ["layer  experts  noise  active  stored  (share of hidden neurons)"]
    for layer in run.layers:
        told = f"  dense: {layer.reason}"
        if layer.converted:
            shares = f"{layer.active_fraction:7.1%} {layer.union_fraction:7.1%}"
            told = f"{layer.experts:7d} {layer.noise_share:6.0%} {shares}"
            told += f"  {layer.reason}" if layer.reason else ""
        lines.append(f"{layer.index:5d}  {told}")
    for name, attention in reduced_attentions(run.model).items():
        ranks, head_dim = attention.ranks, attention.site.head_dim
        asked = f", asked for {ranks.queries} token(s)" if ranks.queries else ""
        lines.append(
            f"{name}: {ranks.scores / head_dim:.0%} of the dimensions of the heads' scores, "
            f"{ranks.values / head_dim:.0%} of their values{asked}"
        )
    if (blocks := merging_blocks(run.model)) is not None:
        merges = ", ".join(map(str, blocks.schedule))
        lines.append(f"tokens that merge into others in each block: {merges}")
    if run.variance_kept is not None:
        lines.append(f"variance kept by each expert: p = {run.variance_kept:.1%}")
    return "\n".join(lines)


def numbers_text(numbers: dict) -> str:
    """The numbers of ``evaluate`` in a few lines."""
    known = numbers["retention"] is not None
    retention, unread = f"{numbers['retention']:.1%}" if known else "undefined", ""
    if numbers["unread_sites"]:
        unread = (
            f"  of these {numbers['macs_unread_moe'] / 1e9:.3f} G (dense "
            f"{numbers['macs_unread_dense'] / 1e9:.3f} G) for tokens that nothing reads, in "
            f"{', '.join(numbers['unread_sites'])}; without these "
            f"{-numbers['macs_reduction_read']:+.1%}\n"
        )
    return (
        f"top-1 {numbers['moe_top1']:.1%} (dense {numbers['dense_top1']:.1%}, retention "
        f"{retention}, agreement {numbers['agreement']:.1%}; random routing "
        f"{numbers['random_routing_top1']:.1%}) on {numbers['n_images']} images\n"
        f"MACs {numbers['macs_moe'] / 1e9:.3f} G (dense {numbers['macs_dense'] / 1e9:.3f} G, "
        f"{-numbers['macs_reduction']:+.1%})\n{_stages_text(numbers)}{unread}"
        f"parameters {numbers['params_moe'] / 1e6:.3f} M (dense "
        f"{numbers['params_dense'] / 1e6:.3f} M, {-numbers['params_reduction']:+.1%})"
    )


def _stages_text(numbers: dict) -> str:
    """What each stage saves, where several do."""
    shares = {name: macs / numbers["macs_dense"] for name, macs in numbers["macs_saved"].items()}
    told = [f"{name} {share:.1%}" for name, share in shares.items() if abs(share) > TINY]
    return f"  saved by {', '.join(told)}\n" if len(told) > 1 else ""


def tuned_text(tuned: Finetuned) -> str:
    """How near a fine-tuned run has come to its dense model."""
    before, best = tuned.history["kl"].iloc[[0, tuned.best]]
    early = f"; ended early: {tuned.stopped}" if tuned.stopped else ""
    return (
        f"divergence from the dense model on images held out: {best:.4f} nats after epoch "
        f"{tuned.best} (before: {before:.4f}){early}"
    )


def comparison_text(table: pd.DataFrame) -> str:
    """Lines of a comparison, the systems of a budget that keep most first."""
    known = table.drop_duplicates(["system", "macs_asked"])
    lines = [
        f"dense top-1 {known['dense_top1'].max():.1%}; of it is kept, and saved:",
        "  kept  (95 %)          random  constant   MACs  params   time  system",
    ]
    for asked, rows in known.groupby("macs_asked", sort=True):
        ranked = rows.sort_values("mean", ascending=False)
        lines.append(f"asked to save {asked:.0%} of the MACs")
        for row in ranked.itertuples():
            if row.reason:
                lines.append(f"  {row.system}: {row.reason}")
                continue
            less = "" if row.reduces_macs else "  (cannot reduce MACs)"
            interval = f"({100 * row.low:.1f} to {100 * row.high:.1f})"
            lines.append(
                f"  {_percent(row.mean)} {interval:16} {_percent(row.random_routing)}   "
                f"{_percent(row.constant_routing)} {_percent(-row.macs_reduction)}  "
                f"{_percent(-row.params_reduction)} {_percent(1 / row.speed_up)}  "
                f"{row.system}{less}"
            )
    return "\n".join(lines)


def _percent(share: float) -> str:
    return "     –" if math.isnan(share) else f"{100 * share:5.1f}%"


def store_text(root: Path, found: Sequence[Entry]) -> str:
    """The content of a store: by run, the one used last first, and by kind for the rest."""
    free = shutil.disk_usage(nearest_folder(root)).free
    total = bytes_text(sum(entry.size for entry in found))
    runs, rest = shares(found)
    lines = [f"{root}: {total} in {len(found)} folders; {bytes_text(free)} free on that disk"]
    if runs:
        lines.append("     alone  with others  last used         run")
    for run, alone, shared in runs:
        used = datetime.fromtimestamp(run.used).strftime("%Y-%m-%d %H:%M")
        sizes = f"{bytes_text(alone):>10}  {bytes_text(shared):>11}"
        lines.append(f"{sizes}  {used}  {run.title}")
    if rest:
        lines.append("of no run that is listed here")
        sizes = pd.DataFrame(rest).groupby("kind")["size"].agg(["sum", "count"])
        for kind, taken, folders in sizes.sort_values("sum", ascending=False).itertuples():
            words = (KINDS | OTHER_KINDS)[kind]
            lines.append(f"{bytes_text(taken):>10}  {words} (folders: {folders})")
    return "\n".join(map(printable, lines))  # a run stays one line


def pruned_text(removed: Sequence[Entry], left: int, in_use: int, *, most: float) -> str:
    """What was removed, and what could not be."""
    gone = bytes_text(sum(entry.size for entry in removed))
    line = f"removed {len(removed)} folders, {gone}; {bytes_text(left)} are left"
    used = f", of which {bytes_text(in_use)} are in use by processes that run"
    return line + used if left > most else line
