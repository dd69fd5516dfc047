"""What a model gets wrong once an expert's tokens are lost; whether classes need what they use."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from scipy.stats import rankdata
from torch import nn

from moee_analysis.data.disjoint import check_disjoint
from moee_analysis.data.images import ImageSet, fitting_batch
from moee_analysis.errors import MoeeError
from moee_analysis.measure.evaluation.accuracy import score_images
from moee_analysis.measure.knockout.intervention import Plan, alone, knock_out_all, removed
from moee_analysis.measure.routing.bootstrap import MIDDLE, against_chance, redraw_counts
from moee_analysis.measure.routing.inputs import Layers, Run, choose_routed, families_of, model_of
from moee_analysis.measure.routing.tables import add_caption, all_rows, stack
from moee_analysis.models.loading import class_labels
from moee_analysis.utils.checks import draw_numbers

Group = tuple[str, str, str, np.ndarray]
"""Kind (all, class or family), name and family of some images, and their indices, int64."""

WHAT = {"removed": removed, "alone": alone}  # the expert is knocked out, or all others are
SYSTEMS = ("expert", "random tokens")  # whose tokens: as many of every image drawn at random
BEYOND = "beyond random tokens"  # what an expert's removal does more than theirs


def knock_out(
    run: Run,
    images: ImageSet,
    calibration: ImageSet,
    *,
    layers: Layers = (),
    reference: nn.Module | None = None,
    families: Mapping[str, str] | None = None,
    resamples: int = 200,
    batch_size: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """What each expert is worth to all images, to every class and to every family of classes.

    In one layer at a time the tokens of one expert (``removed``), or of all others (``alone``), get
    the layer's mean output over a few hundred ``calibration`` images. Beside each stands its
    control: as many tokens of every image, the same leading ones and patches drawn at random.
    Where only the class token is read (the last layer of most ViTs) the two are therefore the same.
    ``reference`` is the dense model; ``families`` of classes, by readable name, add rows.

    Columns: ``layer``, ``expert``, ``what`` (removed | alone), ``system`` (expert | random tokens),
    ``kind`` (all | class | family), ``group`` (its name, with the index where classes share
    one), ``family`` (of a class; empty without ``families``), ``images`` (of the group),
    ``knocked_out`` (mean share of an image's tokens), ``top1_dense`` (nan without ``reference``),
    ``top1_intact``, ``top1``, ``change`` (of top-1, from intact), ``low``, ``high``,
    ``logp_change`` (of the mean log-probability of the true class, in nats), ``logp_low``,
    ``logp_high``. Intervals are 95 %, of the same resampled images; empty for a single one.
    Raises MoeeError: images of the calibration, no images, a layer without experts or with several
    per token, a class without a family, no resamples.
    """
    draw_numbers(seed, resamples=resamples)
    model = model_of(run)
    size = fitting_batch(model, batch_size)
    check_disjoint(calibration, images, use="used for calibration")
    rules = {
        layer: {
            (layer, expert, place): what(expert)
            for expert in range(module.n_experts)
            for place, what in enumerate(WHAT.values())
        }
        for layer, module in choose_routed(model, layers).items()
    }
    plan = Plan.of(model, calibration, rules, seed=seed)
    groups = _group_images(model, images, families)
    dense = np.full(len(images), math.nan)
    if reference is not None:
        dense = score_images({"dense": reference}, images)["dense"]["right"].astype(float)
    truth = torch.from_numpy(images.labels(model)).to(next(model.parameters()).device)
    intact, found = knock_out_all(model, images, plan, model, partial(_judge, truth), size=size)
    draws = [redraw_counts(len(own), resamples, seed=seed) / len(own) for *_, own in groups]
    parts = []
    for layer, of_layer in found.items():
        facts = [each.astype(float) for each in of_layer]
        for group, weights in zip(groups, draws, strict=True):
            parts.append((layer, _describe_group(group, weights, facts, (intact, dense))))
    return add_caption(
        stack(parts, by=["layer"]),
        f"Tokens knocked out get the layer's mean output over {len(calibration)} calibration "
        f"images. Control: as many tokens of each of the {len(images)} images, patches at random "
        f"(drawn once). 95 % intervals: {resamples} resamples of images, seed {seed}.",
    )


def uses_and_needs(table: pd.DataFrame) -> pd.DataFrame:
    """How much more than all classes each class uses an expert, and loses without it.

    ``use`` is the expert's share of the class's tokens, ``need`` how much the log-probability of
    the class falls without them, in nats. Fewer than four classes are refused.
    """
    rows = table[(table["kind"] == "class") & (table["what"] == "removed")]
    if (classes := rows["group"].nunique()) < 4:
        raise MoeeError("at least four classes", f"{classes}", "knock out with more images")
    rows = rows.rename(columns={"group": "class_name", "knocked_out": "use"})
    rows = rows.assign(need=-rows["logp_change"])
    keys, values = ["layer", "class_name", "expert"], ["use", "need"]
    wide = rows.pivot(index=keys, columns="system", values=values)
    need = wide["need", "expert"] - wide["need", "random tokens"]
    beyond = pd.DataFrame({"use": wide["use", "expert"], "need": need}).reset_index()
    columns = ["layer", "system", "class_name", "expert", *values]
    found = pd.concat([rows[columns], beyond.assign(system=BEYOND)], ignore_index=True)
    found[values] -= found.groupby(["layer", "system", "expert"])[values].transform("mean")
    return found


def use_and_need(table: pd.DataFrame, *, permutations: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Rank correlation of use and need over pairs of class and expert, layer by layer.

    A class that sends an expert more of its tokens loses more of them when it goes, whatever the
    expert: the same is asked of random tokens, and of what the expert's removal does beyond them.
    Chance: what classes need is permuted over whole classes. ``table`` is of ``knock_out``.

    Columns: ``layer``, ``system``, ``experts``, ``classes``, ``spearman``, ``null_mean``,
    ``null_high`` (95 %), ``p`` (one-sided), ``excess``; ``top_match`` (share of classes whose most
    over-used expert is the one whose removal costs them most, beside other classes), the same of
    its chance with the prefix ``top_match_``, and ``top_match_even`` (1 / experts).
    Raises MoeeError: fewer than four classes, or no permutations.
    """
    draw_numbers(seed, permutations=permutations)
    rows = []
    for (layer, system), part in uses_and_needs(table).groupby(["layer", "system"], sort=False):
        wide = part.pivot(index="class_name", columns="expert", values=["use", "need"])
        use, need = wide["use"].to_numpy(), wide["need"].to_numpy()
        classes, experts = use.shape
        rng = np.random.default_rng(seed)
        orders = [np.arange(classes), *(rng.permutation(classes) for _ in range(permutations))]
        one, other, top, most = _rank(use), _rank(need), use.argmax(axis=1), need.argmax(axis=1)
        row = {"layer": layer, "system": system, "experts": experts, "classes": classes}
        for name, prefix, values in (
            ("spearman", "", [(one * other[order]).sum() for order in orders]),
            ("top_match", "top_match_", [(top == most[order]).mean() for order in orders]),
        ):
            # the first order is that of the classes, the others are chance
            chance = against_chance(values[0], np.array(values[1:]))
            row[name] = float(values[0])
            row |= {prefix + each: float(value) for each, value in chance.items()}
        rows.append(row | {"top_match_even": 1 / experts})
    return add_caption(
        pd.DataFrame(rows),
        f"Pairs of {rows[0]['classes']} classes and the experts of a layer. "
        f"Null: {permutations} permutations of whole classes, seed {seed}.",
    )


def _rank(values: np.ndarray) -> np.ndarray:
    """Ranks of ``values`` less their mean, of length 1; all 0 where they are constant."""
    ranks = rankdata(values).reshape(values.shape)
    ranks -= ranks.mean()
    length = np.linalg.norm(ranks)
    return ranks / length if length else ranks


def _group_images(
    model: nn.Module, images: ImageSet, families: Mapping[str, str] | None
) -> list[Group]:
    labels, names = images.labels(model), class_labels(model)
    classes = np.unique(labels)
    own = [names[c] for c in classes]
    family = [""] * len(own) if families is None else families_of(own, families)
    of_image = np.array(family)[np.searchsorted(classes, labels)]
    groups = [("all", "all", "", np.arange(len(labels)))]
    for c, name, kin in zip(classes, own, family, strict=True):
        unlike = f"{name} ({c})" if own.count(name) > 1 else name
        groups.append(("class", unlike, kin, np.flatnonzero(labels == c)))
    kins = filter(None, dict.fromkeys(family))
    return groups + [("family", k, k, np.flatnonzero(of_image == k)) for k in kins]


def _judge(truth: torch.Tensor, logits: torch.Tensor, place: slice) -> np.ndarray:
    """Whether the model is right, and the log-probability of the true class: (rules, images, 2)."""
    right = logits.argmax(dim=2) == truth[place]
    where = truth[place].expand(len(logits), -1)[..., None]
    logp = logits.float().log_softmax(dim=2).gather(2, where)[..., 0]
    return torch.stack([right.to(logp), logp], dim=2).double().cpu().numpy()


def _describe_group(
    group: Group, weights: np.ndarray, found: list[np.ndarray], unchanged: Sequence[np.ndarray]
) -> pd.DataFrame:
    """Rows of one layer and one group; ``unchanged`` are intact facts, and the dense model's."""
    (kind, name, family, own), (share, facts), (intact, dense) = group, found, unchanged
    right, logp = (np.ascontiguousarray(facts[:, own, fact]) for fact in (0, 1))
    change, drop = right - intact[own, 0], logp - intact[own, 1]
    low, high = _bound_means(change, weights)
    logp_low, logp_high = _bound_means(drop, weights)
    rows = all_rows(expert=range(len(right) // 4), what=WHAT, system=SYSTEMS)
    rows = rows.assign(kind=kind, group=name, family=family, images=len(own))
    rows = rows.assign(knocked_out=share[:, own].mean(axis=1), top1_dense=dense[own].mean())
    rows = rows.assign(top1_intact=intact[own, 0].mean(), top1=right.mean(axis=1))
    rows = rows.assign(change=change.mean(axis=1), low=low, high=high)
    return rows.assign(logp_change=drop.mean(axis=1), logp_low=logp_low, logp_high=logp_high)


def _bound_means(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """95 % bootstrap intervals of the means of ``values`` (rows, images): (2, rows)."""
    if values.shape[1] < 2:  # a single image cannot be resampled
        return np.full((2, len(values)), math.nan)
    return np.quantile(weights @ values.T, MIDDLE, axis=0)
