"""What the command line prints."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

    from moee_analysis.extraction.pipeline import Extraction
    from moee_analysis.models.attention import LowRankAttention
    from moee_analysis.training.finetune import Finetuned


def layers_text(run: Extraction) -> str:
    """Say what has become of each layer of a run."""
    from moee_analysis.models.attention import reduced_attentions

    lines = ["layer  experts  noise  active  stored  (share of hidden neurons)"]
    for layer in run.layers:
        kept = (
            f"{layer.experts:7d} {layer.noise_share:6.0%} {layer.active_fraction:7.1%} "
            f"{layer.union_fraction:7.1%}"
            if layer.converted
            else f"  dense: {layer.reason}"
        )
        lines.append(f"{layer.index:5d}  {kept}")
    for name, attention in reduced_attentions(run.model).items():
        lines.append(f"{name}: {_heads_text(attention)}")
    if run.variance_kept is not None:
        lines.append(f"variance kept by each expert: p = {run.variance_kept:.1%}")
    return "\n".join(lines)


def _heads_text(attention: LowRankAttention) -> str:
    ranks = attention.ranks
    scores, values = (
        f"{rank / attention.site.head_dim:.0%}" for rank in (ranks.scores, ranks.values)
    )
    asked = f", asked for {ranks.queries} token(s)" if ranks.queries else ""
    return f"{scores} of the dimensions of the heads' scores, {values} of their values{asked}"


def numbers_text(numbers: dict) -> str:
    """Sum up what ``evaluate`` has found."""
    known = numbers["retention"] is not None
    retention = f"{numbers['retention']:.1%}" if known else "undefined"
    return (
        f"top-1 {numbers['moe_top1']:.1%} (dense {numbers['dense_top1']:.1%}, retention "
        f"{retention}, agreement {numbers['agreement']:.1%}; random routing "
        f"{numbers['random_routing_top1']:.1%}) on {numbers['n_images']} images\n"
        f"MACs {numbers['macs_moe'] / 1e9:.3f} G (dense {numbers['macs_dense'] / 1e9:.3f} G, "
        f"-{numbers['macs_reduction']:.1%})\n{_unread_text(numbers)}"
        f"parameters {numbers['params_moe'] / 1e6:.3f} M (dense "
        f"{numbers['params_dense'] / 1e6:.3f} M, -{numbers['params_reduction']:.1%})"
    )


def _unread_text(numbers: dict) -> str:
    """What goes to tokens that nothing reads, a line of its own; nothing where nothing does."""
    if not numbers["unread_sites"]:
        return ""
    return (
        f"  of these {numbers['macs_unread_moe'] / 1e9:.3f} G (dense "
        f"{numbers['macs_unread_dense'] / 1e9:.3f} G) for tokens that nothing reads, in "
        f"{', '.join(numbers['unread_sites'])}; without these "
        f"-{numbers['macs_reduction_read']:.1%}\n"
    )


def tuned_text(tuned: Finetuned) -> str:
    """Say how near a fine-tuned run has come to its dense model."""
    first, kept = tuned.history["kl"].iloc[[0, tuned.best]]
    early = f"; ended early: {tuned.stopped}" if tuned.stopped else ""
    return (
        f"divergence from the dense model on images held out: {kept:.4f} nats after epoch "
        f"{tuned.best} (before: {first:.4f}){early}"
    )


def comparison_text(table: pd.DataFrame) -> str:
    """Lines of a comparison, the systems of a budget that keep most first."""
    known = table.drop_duplicates(["system", "macs_asked"])
    lines = [
        f"dense top-1 {known['dense_top1'].max():.1%}; of it is kept, and saved:",
        "  kept  (95 %)          random  constant   MACs  params   time  system",
    ]
    for asked, rows in known.groupby("macs_asked", sort=True):
        lines.append(f"asked to save {asked:.0%} of the MACs")
        lines += [
            _system_text(row) for row in rows.sort_values("mean", ascending=False).itertuples()
        ]
    return "\n".join(lines)


def _system_text(row: object) -> str:
    if row.reason:
        return f"  {row.system}: {row.reason}"
    less = "" if row.reduces_macs else "  (cannot reduce MACs)"
    interval = f"({100 * row.low:.1f} to {100 * row.high:.1f})"
    return (
        f"  {_percent(row.mean)} {interval:16} {_percent(row.random_routing)}   "
        f"{_percent(row.constant_routing)} {_percent(-row.macs_reduction)}  "
        f"{_percent(-row.params_reduction)} {_percent(1 / row.speed_up)}  {row.system}{less}"
    )


def _percent(share: float) -> str:
    return "     –" if math.isnan(share) else f"{100 * share:5.1f}%"
