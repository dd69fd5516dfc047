"""The tables of README and docs, from measured results: so no two documents disagree.

``python benchmarks/results.py`` writes what stands between ``<!-- results:NAME -->`` and
``<!-- /results -->`` anew, from ``docs/results.json`` and what the other benchmarks left in
``docs``. With ``--report reports --machine "two AMD cores"`` it first takes key numbers, verdicts
and times of the notebooks from a finished report.
"""

import json
import re
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import common
from common import Row

from moee_analysis.errors import MoeeError
from moee_analysis.utils.storage.files import write_text

ROOT = Path(__file__).resolve().parents[1]
MEASURED = ROOT / "docs" / "results.json"
MARKED = re.compile(r"(<!-- results:(\w+) -->\n).*?(<!-- /results -->)", re.S)
VERDICTS = {True: "holds", None: "in part", False: "does not hold"}
FREE = (0.2, None), (0.28, None), (0.36, None), (0.45, None)
LEFT_OUT = (  # of the rivals: close to others, or saving nothing
    "static: least squares", "static: magnitude", "MoEfication: k-means, MLP, means kept",
    "MoEfication: k-means, centre, means kept", "Sparse Upcycling: top-1",
)  # fmt: skip
SPEED = 0.28, None  # the budget at which times are measured
BOUND = (0.29, 0.18), (0.36, 0.28)
TOO = ", attention too"
RETENTION = "retention", "retention_"


def read(name: str) -> Any:
    """What a benchmark left in ``docs``."""
    return json.loads((ROOT / "docs" / name).read_text(encoding="utf-8"))


def measured(name: str) -> Any:
    """What ``docs/results.json`` has by this name."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))[name]


def documents() -> list[Path]:
    """What people read: README and the pages of ``docs``, without what benchmarks write there."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(text: str) -> str:
    """``text`` of a document, each marked table as it has to be."""
    return MARKED.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def take(report: Path, machine: str) -> None:
    """Put what a finished report found in the place of what is known of its notebooks.

    Raises MoeeError: a notebook that did not end, or of another preset.
    """
    known = json.loads(MEASURED.read_text(encoding="utf-8"))
    for file in sorted(report.glob("*/results.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if "environment" not in found or found["parameters"]["preset"] != "small":
            raise MoeeError(
                "a finished notebook of preset small", f"another in '{file.parent}'",
                "take the folder of a whole report",
            )  # fmt: skip
        environment, claims = found["environment"], found["claims"]
        known["notebooks"][file.parent.name] = {
            "date": environment["finished"][:10], "machine": machine,
            "preset": found["parameters"]["preset"], "seed": found["parameters"]["seed"],
            "seconds": round(environment["seconds"]), "headline": found["headline"],
            "claims": [{k: c[k] for k in ("statement", "holds")} for c in claims if not c["ours"]],
        }  # fmt: skip
    write_text(MEASURED, json.dumps(known, indent=2, ensure_ascii=False) + "\n")


# Shares as texts


def percent(share: float) -> str:
    """``97.5 %``."""
    return f"{100 * share:.1f} %"


def kept(row: Row, mean: str = "mean", prefix: str = "") -> str:
    """``97.5 % (95.8 to 99.2)``."""
    low, high = (100 * row[f"{prefix}{end}"] for end in ("low", "high"))
    return f"{percent(row[mean])} ({low:.1f} to {high:.1f})"


def table(header: str, lines: Iterable[Sequence[str]]) -> str:
    """A table of texts, its header as it is read."""
    return common.as_markdown(header.split(" | "), lines)


# DeiT-Tiny at six budgets


def at(budget: tuple[float, float | None]) -> dict[str, Row]:
    """Every system that reached one budget, by name."""
    rows = read("fidelity/deit_tiny/fidelity.json")["rows"]
    found = [row for row in rows if (row["macs_asked"], row["params_asked"]) == budget]
    return {row["system"]: row for row in found if row["retention"] is not None}


def strongest(systems: dict[str, Row], too: str = "") -> Row:
    """Of static pruning of MLPs that which keeps most; or the one of attention too."""
    if too:
        return systems[f"fisher OBS{too}"]
    static = (row for row in systems.values() if row["family"] == "static pruning")
    return max(static, key=lambda row: row["retention"])


def front() -> str:
    """The one table of README."""
    lines = []
    for too, what in (("", "MLPs"), (TOO, "attention too")):
        for budget in FREE:
            systems = at(budget)
            best, static = systems[f"best{too}"], strongest(systems, too)
            lines.append([
                what, percent(best["macs_reduction"]), kept(best, *RETENTION),
                percent(static["retention"]), speed(f"best{too}") * (budget == SPEED),
            ])  # fmt: skip
    return table(
        "made smaller | MACs saved | kept by `best` | by static pruning | times as fast", lines
    )


def fidelity(too: str, others: dict[str, str]) -> str:
    """``best`` at every budget beside its controls, by their name in the table and in the JSON."""
    lines = []
    for budget in (*FREE, *BOUND):
        systems = at(budget)
        best = systems[f"best{too}"]
        controls = [systems.get(name) for name in others.values()]
        lines.append([
            *(f"{change} %" for change in common.percent_changes(best)), kept(best, *RETENTION),
            f"{best['kl']:.3f}", percent(strongest(systems, too)["retention"]),
            *("" if row is None else percent(row["retention"]) for row in controls),
        ])  # fmt: skip
    header = ["MACs", "stored", "kept by `best`", "KL, nats", "static pruning", *others]
    return common.as_markdown(header, lines)


# Other tables of docs/results.md


def inference() -> str:
    """Times as fast as the dense model, over one thread and two, system by system."""
    lines = [
        [row["system"], row["machine"], row["date"], *row["times_as_fast"].values()]
        for row in measured("inference")["rows"]
    ]
    return table("system | machine | date | batches of 1 | of 8 | of 64", lines)


def speed(system: str) -> str:
    """With batches of 64, on every kind of machine that it was measured on."""
    rows = [row for row in measured("inference")["rows"] if row["system"] == system]
    return "; ".join(f"{row['times_as_fast']['64']}, {row['machine']}" for row in rows)


def rivals() -> str:
    """The systems, those that keep most at −28 % first."""
    systems: dict[str, dict[float, Row]] = {}
    for row in read("rivals/deit_tiny/rivals.json")["rows"]:
        systems.setdefault(row["system"], {})[row["macs_asked"]] = row
    lines = []
    for name, rows in sorted(systems.items(), key=lambda pair: -pair[1][0.28]["retention"]):
        if name in LEFT_OUT:
            continue
        middle, spread = rows[0.28], rows[0.28]["over_seeds"]
        routed = [middle["controls"].get(f"{kind}_routing") for kind in ("random", "oracle")]
        lines.append([
            name, percent(rows[0.2]["retention"]), kept(spread), percent(rows[0.36]["retention"]),
            *(percent(found["retention"]) if found else "" for found in routed),
            f"{-100 * middle['params_reduction']:+.1f} %".replace("-", "−"),
        ])  # fmt: skip
    return table("system | −20 % | −28 % | −36 % | random routing | oracle routing | stored", lines)


def jetpack() -> str:
    """Each start of a successor, trained."""
    lines = [
        [row["start"], kept(row, "top1"),
         f"{row['params'] / 1e6:.2f} M"]
        for row in read("jetpack/jetpack.json")["rows"]["components"]
    ]  # fmt: skip
    return table("start | top-1 after 48,000 images | parameters", lines)


def fine_tuning() -> str:
    """Experts and static pruning before and after the same training, divergence over the seeds."""
    stages: dict[str, dict[str, list[Row]]] = {}
    for row in read("fine_tuning/bundled/fine_tuning.json")["rows"]:
        stages.setdefault(row["system"], {}).setdefault(row["stage"], []).append(row)
    lines = []
    for name, rows in stages.items():
        ends = [rows[stage][0] for stage in ("before", "after")]
        shares = [kept(row) for row in ends]
        divergence = [sum(r["kl"] for r in each) / len(each) for each in rows.values()]
        lines.append([name, *shares, *(f"{value:.3f}" for value in divergence)])
    return table("system | kept before | after | KL before, nats | after", lines)


# Notebooks


def headlines() -> str:
    """The key number of each notebook, and where it was measured."""
    lines = []
    for name, found in measured("notebooks").items():
        label, value, beside = (found["headline"][key] for key in ("label", "value", "dense"))
        lines.append([f"[{name}](../notebooks/{name}.ipynb)", f"**{value}** {label}", beside])
    facts = (f"{f['date']}, {f['machine']}, preset `{f['preset']}`, seed {f['seed']}"
             for f in measured("notebooks").values())  # fmt: skip
    told = "; ".join(dict.fromkeys(facts))
    return (
        f"{table('notebook | key number | beside it', lines)}\n\nMeasured by `make report`: {told}."
    )


def claims() -> str:
    """The paper's claims on the bundled model, and on DeiT-Tiny where that was measured."""
    other = measured("verdicts_deit_tiny")["holds"]
    lines = []
    for name, found in measured("notebooks").items():
        for claim in found["claims"]:
            if name != "09_jetpack":  # those are another paper's
                said = claim["statement"]
                more = VERDICTS[other[said]] if said in other else ""
                lines.append([said.rstrip("."), name[:2], VERDICTS[claim["holds"]], more])
    return table("the paper says | notebook | bundled model | DeiT-Tiny", lines)


def times(names: Sequence[str]) -> str:
    """How long some notebooks take."""
    lines = []
    for name in names:
        seconds = measured("notebooks")[name]["seconds"]
        told = f"{seconds / 60:.0f} min" if seconds >= 100 else f"{seconds} s"
        lines.append([f"[{name}](../notebooks/{name}.ipynb)", told])
    return table("notebook | takes", lines)


CONTROLS = {
    "random centres": "best, random centres", "random routing": "best, random routing",
    "paper": "paper",
}  # fmt: skip
LESSON = (
    "01_extraction", "02_routing_distributions", "03_class_specific_experts",
    "04_mean_input_similarity", "10_knock_out",
)  # fmt: skip
TABLES: dict[str, Callable[[], str]] = {
    "front": front,
    "mlps": partial(fidelity, "", CONTROLS),
    "attention": partial(fidelity, TOO, {"random routing": f"best{TOO}, random routing"}),
    "inference": inference,
    "rivals": rivals,
    "jetpack": jetpack,
    "fine_tuning": fine_tuning,
    "headlines": headlines,
    "claims": claims,
    "times": partial(times, LESSON),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Take a report's numbers where one is given; then write the tables."""
    parser = ArgumentParser(prog="results", description=__doc__.splitlines()[0])
    parser.add_argument("--report", type=Path, help="folder of a finished report")
    parser.add_argument("--machine", help="kind of machine it was made on, as 'two AMD cores'")
    asked = parser.parse_args(argv)
    if asked.report:
        if not asked.machine:
            parser.error("--report needs --machine: clusters and times differ between kinds")
        take(asked.report, asked.machine)
    for page in documents():
        write_text(page, filled(page.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
