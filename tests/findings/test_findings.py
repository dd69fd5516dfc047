from __future__ import annotations

import json
import math
import re

import numpy as np
import pandas as pd
import pytest

from moee_analysis import findings, plots
from moee_analysis.errors import MoeeError
from moee_analysis.utils import paths
from tests.helpers.finding_tables import CHOICE, TABLES

SAID = {
    "accuracy": "MoEE keeps 50.0 % of the dense top-1 (90.0 %), random 10.0 %.",
    "layers": (
        "2 of 3 layers have clusters: 4 to 7 (highest in layer 2). Noise among the clustered "
        "tokens: 20.0 % to 40.0 % (highest in layer 2). Hidden neurons that a token uses: 25.0 % "
        "to 50.0 % (highest in layer 1)."
    ),
    "sizes": (
        "Of a layer's hidden neurons: MoEE experts keep 20.0 % to 50.0 %, a token uses on average "
        "30.0 % to 40.0 % (highest in layer 4), and 80.0 % to 100.0 % are stored."
    ),
    "neurons": (
        "Of the hidden neurons an expert keeps 25.0 % to 50.0 % in layer 3 (50.0 % are kept by "
        "none); 100.0 % in layer 5 (0.0 % are kept by none)."
    ),
    "overlap": (
        "The Jaccard index of two experts' neurons is 0.10 to 0.50 (highest in layer 3); random "
        "subsets of their sizes would have 0.20 to 0.30. 1 of 2 pairs share more than that."
    ),
    "embedding": (
        "The tokens fall into 1 cluster in layer 3 (50.0 % in none) and 2 clusters in layer 5 "
        "(0.0 % in none)."
    ),
    "surrogate": (
        "Layer 3: 12 clusters and 20.0 % noise in the activations, 2 and 75.0 % in a surrogate "
        "that has no clusters by construction."
    ),
    "macs": (
        "An image takes 800 instead of the dense model's 1000 million MACs (−20.0 %); stored "
        "parameters change by +1.0 %. Of the MLPs' MACs most is saved in layer 0 (−66.7 %), least "
        "in layer 1 (+0.0 %)."
    ),
    "routing": (
        "The most used expert of a layer takes so many times an even share: MoEE 1.00 to 2.00 "
        "(highest in layer 0)."
    ),
    "balance": (
        "Gini coefficient (0 is even) over the layers: MoEE 0.20 to 0.40 (highest in layer 1); "
        "random centres 0.30."
    ),
    "class_routing": (
        "A class leans most to one expert in layer 9: 90.0 % of the tokens of plane go to expert 1 "
        "(all classes: 40.0 %); least in layer 3: 30.0 % of the tokens of pug go to expert 0 (all "
        "classes: 20.0 %)."
    ),
    "specificity": (
        "Mean divergence of a class from all classes, in bits, bias removed: MoEE 0.010 to 0.250 "
        "(highest in layer 5), beyond permuted labels in 1 of 2 layers."
    ),
    "class_information": (
        "Of the experts' entropy the class of the image explains: MoEE 1.0 % to 12.3 % (highest in "
        "layer 5), more than permuted labels in 1 of 2 layers."
    ),
    "class_distance": (
        "Routed most differently: pug and cliff in layer 3 (0.600 bits). Most alike: pug and cat "
        "in layer 3 (0.050 bits); two halves of one class differ by 0.010."
    ),
    "family_separation": (
        "Probability that two classes of a family are routed more alike than two of different "
        "families (chance 0.50): MoEE 0.50 to 0.90 (highest in layer 1), beyond permuted families "
        "in 1 of 2 layers."
    ),
    "class_relatedness": (
        "Rank correlation of routing distance and classifier distance: MoEE −0.10 to 0.40 (highest "
        "in layer 1), beyond permuted classes in 1 of 2 layers."
    ),
    "modularity": (
        "Adjusted mutual information of expert and part: MoEE 0.20 to 0.40 (highest in layer 1), "
        "beyond masks exchanged within a class in 2 of 2 layers."
    ),
    "part_profile": (
        "Purest is expert 0 of layer 3: 90.0 % of its patches show sky, of all patches 40.0 %. It "
        "takes 10.0 % of the patches."
    ),
    "similarity": (
        "Cosines of two experts' mean inputs: layer 5 0.50 to 0.90 (centred −0.50 to 0.10)."
    ),
    "similarity_summary": (
        "Mean cosine of two experts' mean inputs over the layers: MoEE 0.20 to 0.50 (highest in "
        "layer 0), centred −0.10; nearly orthogonal are 0.0 % to 40.0 % of the pairs, the common "
        "mean holds 30.0 % to 60.0 %."
    ),
    "ablation": (
        "KL divergence from the dense model: 0.010 nats with best and 0.600 nats with paper. Most "
        "is lost without refit (0.500 nats). Most is gained alone by refit (0.100 nats). Controls: "
        "random routing of best 0.900 nats."
    ),
    "sweeps": "Lowest KL divergence, in nats: experts: 8 (0.100).",
    "router_regret": (
        "Squared error of the output over its variance, by router, over the layers: centre 2.0 % "
        "to 4.0 % (regret 1.0 %, best expert for 50.0 % to 60.0 % of the tokens); oracle 1.0 % "
        "(regret 0.0 %, best expert for 100.0 % of the tokens)."
    ),
    "architectures": (
        "Experts per layer: ViT 4 to 9 and Swin 7. Of the experts' entropy the class explains: ViT "
        "1.0 % to 20.0 %."
    ),
    "architecture_variants": (
        "Kept of the dense top-1: ViT 99.0 % (best) and 80.0 % (best, random routing)."
    ),
    "fine_tuning": (
        "Kept of the dense top-1 at 45.0 % fewer MACs: MoEE 90.0 % before and 95.0 % after."
    ),
    "history": (
        "On images held out the divergence from the dense model goes from 0.500 to 0.200 nats, its "
        "lowest, after epoch 1, and the agreement with its predictions from 80.0 % to 90.0 %."
    ),
    "comparison": (
        "Of the dense top-1, at −28 % MACs best keeps most (98.0 %), of the other families pruned "
        "(90.0 %), and paper (85.0 %) least."
    ),
    "routing_controls": (
        "At −28 % MACs 1 of 2 systems keep more with their own router than with random routing, "
        "best gains most (98.0 % against 80.0 %); the best static pruning keeps 90.0 %."
    ),
    "learning_curves": (
        "After 64 training images top-1 is highest for a: 60.0 % (50.0 % to 70.0 %), lowest for b: "
        "40.0 % (30.0 % to 50.0 %)."
    ),
    "learned": (
        "At the end top-1 is highest for a: 60.0 % (50.0 % to 70.0 %), lowest for b: 40.0 % "
        "(30.0 % to 50.0 %). 50.0 % is reached first by a, after 30 images."
    ),
    "which_beats_which": (
        "1 of 1 pairs of starts differ beyond chance; the largest lead is that of a over b, +20.0 "
        "points of top-1 (+10.0 to +30.0)."
    ),
    "contributions": (
        "Mean length of what is added to a token, over the layers: core 2.00 to 4.00 (highest in "
        "layer 7); universal 0.50."
    ),
}
SENTENCE = re.compile(r"[A-Z0-9−].*\.", re.DOTALL)

every = pytest.mark.parametrize("name", TABLES)


@every
def test_says_what_the_table_shows(name):
    assert getattr(findings, name)(TABLES[name]) == SAID[name]


@every
def test_leaves_the_table_alone_and_does_not_ask_for_its_index(name):
    table = TABLES[name].copy()
    again = table.set_index(pd.Index(range(7, 7 + len(table))))
    assert getattr(findings, name)(again) == SAID[name]
    assert table.equals(TABLES[name])


@every
def test_a_table_of_which_nothing_is_known_gives_a_sentence_all_the_same(name):
    table = TABLES[name].copy()
    measured = table.select_dtypes("float").columns
    table[measured] = math.nan
    said = getattr(findings, name)(table)
    assert SENTENCE.fullmatch(said)
    assert not re.search(r"\bnan\b", said)


@every
def test_one_row_is_enough(name):
    table = TABLES[name]
    last = table[table["component"] == "total"] if name == "macs" else table
    one = last.head(1) if name != "surrogate" else last
    assert SENTENCE.fullmatch(getattr(findings, name)(one))


def test_accuracy_without_a_reference_is_top_1_alone():
    alone = TABLES["accuracy"].assign(retention=math.nan, kl=math.nan, reference_top1=math.nan)
    said = "Top-1 is: dense 90.0 %, MoEE 45.0 % and random 9.0 %."
    assert findings.accuracy(alone) == said


def test_no_layer_with_experts_is_said():
    dense = TABLES["layers"].assign(converted=False)
    assert findings.layers(dense) == "0 of 3 layers have clusters: all stay dense."


def test_several_systems_are_named():
    table = TABLES["neurons"]
    both = pd.concat([table, table.assign(system="random centres")], ignore_index=True)
    assert "in layer 3 of random centres" in findings.neurons(both)


def test_patches_say_whether_neighbours_share_an_expert():
    said = findings.patches([np.zeros((4, 4, 3), np.uint8)], CHOICE)
    assert said == (
        "1 picture. Layer 3: 2 experts take the patches, and 50.0 % of neighbouring patches "
        "share one (by chance 50.0 %)."
    )
    assert "no layer" in findings.patches([], {})
    single = findings.patches([], {0: np.zeros((1, 1, 1), int)})
    assert "1 expert takes the patches, and unknown of" in single


def test_every_plot_that_a_notebook_shows_has_a_finding():
    shown = set()
    for path in paths.notebooks_folder().glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
        shown |= set(re.findall(r"\bplots\.(\w+)", code))
    assert shown
    for name in shown:
        assert findings.of(getattr(plots, name)).__name__ == name


@pytest.mark.parametrize("name", ["no_such_plot", "of", "learning", "math"])
def test_a_plot_without_a_finding_is_refused(name):
    def plot():
        """Bears the name of no finding."""

    plot.__name__ = name
    with pytest.raises(MoeeError, match=f"a function '{name}'"):
        findings.of(plot)
