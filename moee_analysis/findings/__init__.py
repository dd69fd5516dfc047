"""Findings: every function takes the table of the plot of the same name and says what it shows.

One or two plain sentences with the numbers that count: the alternative text of the figure. Nothing
is computed but extremes, counts and comparisons of what is in the table.
"""

from __future__ import annotations

from collections.abc import Callable

from moee_analysis.errors import MoeeError
from moee_analysis.findings.ablation import ablation as ablation
from moee_analysis.findings.ablation import sweeps as sweeps
from moee_analysis.findings.accuracy import accuracy as accuracy
from moee_analysis.findings.architectures import architecture_variants as architecture_variants
from moee_analysis.findings.architectures import architectures as architectures
from moee_analysis.findings.class_distance import class_distance as class_distance
from moee_analysis.findings.class_distance import class_relatedness as class_relatedness
from moee_analysis.findings.class_distance import family_separation as family_separation
from moee_analysis.findings.class_routing import class_information as class_information
from moee_analysis.findings.class_routing import class_routing as class_routing
from moee_analysis.findings.class_routing import specificity as specificity
from moee_analysis.findings.comparison import comparison as comparison
from moee_analysis.findings.comparison import routing_controls as routing_controls
from moee_analysis.findings.contributions import contributions as contributions
from moee_analysis.findings.experts import layers as layers
from moee_analysis.findings.experts import neurons as neurons
from moee_analysis.findings.experts import overlap as overlap
from moee_analysis.findings.experts import sizes as sizes
from moee_analysis.findings.fine_tuning import fine_tuning as fine_tuning
from moee_analysis.findings.fine_tuning import history as history
from moee_analysis.findings.knock_out import class_knock_out as class_knock_out
from moee_analysis.findings.knock_out import knock_out as knock_out
from moee_analysis.findings.knock_out import use_and_need as use_and_need
from moee_analysis.findings.learning import learned as learned
from moee_analysis.findings.learning import learning_curves as learning_curves
from moee_analysis.findings.learning import which_beats_which as which_beats_which
from moee_analysis.findings.macs import macs as macs
from moee_analysis.findings.modularity import modularity as modularity
from moee_analysis.findings.modularity import part_profile as part_profile
from moee_analysis.findings.parts_unseen import parts_unseen as parts_unseen
from moee_analysis.findings.router_regret import router_regret as router_regret
from moee_analysis.findings.routing import balance as balance
from moee_analysis.findings.routing import routing as routing
from moee_analysis.findings.similarity import similarity as similarity
from moee_analysis.findings.similarity import similarity_summary as similarity_summary
from moee_analysis.findings.typical import image_layers as image_layers
from moee_analysis.findings.typical import top_patches as top_patches
from moee_analysis.findings.walkthrough import embedding as embedding
from moee_analysis.findings.walkthrough import patches as patches
from moee_analysis.findings.walkthrough import surrogate as surrogate


def of(plot: Callable[..., object]) -> Callable[..., str]:
    """Return the twin of ``plot``: the function here that bears its name.

    Raises
    ------
    MoeeError
        There is none.
    """
    twin = globals().get(plot.__name__)
    if not callable(twin) or twin.__module__ == __name__:
        raise MoeeError(
            f"a function '{plot.__name__}' in moee_analysis.findings",
            "none",
            "write one, from the same table to a sentence, or give the figure's finding as text",
        )
    return twin
