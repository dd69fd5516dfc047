"""Measures: models and images in, tidy tables out; most have a plot of the same name.

Arguments that most share: ``source``, a run or a routed model with ``images`` to route, its routes,
or the routes of several systems; ``layers`` to show, counted from 0, and ``classes``, by name or
index (empty: all); ``resamples`` of images for 95 % intervals and ``permutations`` for chance, both
by ``seed``; ``system``, a name for the table. A table has its caption in ``attrs["caption"]``. What
cannot be measured is refused by a ``MoeeError``.
"""

# ruff: noqa: F401
from moee_analysis.measure.evaluation.ablation import ablation, sweeps
from moee_analysis.measure.evaluation.accuracy import accuracy, agreement
from moee_analysis.measure.evaluation.architectures import architecture_variants, architectures
from moee_analysis.measure.evaluation.latency import latency
from moee_analysis.measure.evaluation.mac_table import macs
from moee_analysis.measure.evaluation.trainings import (
    Trainings,
    beats_all,
    fine_tuning,
    learned,
    learning_curves,
    trainings,
    which_beats_which,
)
from moee_analysis.measure.evaluation.variants import variants
from moee_analysis.measure.knockout.knock_out import knock_out, use_and_need
from moee_analysis.measure.knockout.parts_unseen import parts_unseen
from moee_analysis.measure.routing.classes import (
    class_distance,
    class_information,
    class_relatedness,
    class_routing,
    specificity,
)
from moee_analysis.measure.routing.cluster_embedding import embedding, surrogate
from moee_analysis.measure.routing.experts import (
    layers,
    neurons,
    overlap,
    similarity,
    similarity_summary,
    sizes,
)
from moee_analysis.measure.routing.load_balance import balance, routing
from moee_analysis.measure.routing.merging import merging, token_places
from moee_analysis.measure.routing.part_alignment import modularity, part_profile
from moee_analysis.measure.routing.router_regret import rerouted, router_choices, router_regret
from moee_analysis.measure.routing.routes import Routes, routes
from moee_analysis.measure.routing.slot_contributions import contributions
from moee_analysis.measure.routing.top_patches import top_patches, typical
