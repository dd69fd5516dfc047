"""Measures: models and images in, tidy tables out; most have a plot of the same name.

Arguments that most share: ``source``, a run or a routed model with ``images`` to route, its routes,
or the routes of several systems; ``layers`` to show, counted from 0, and ``classes``, by name or
index (empty: all); ``resamples`` of images for 95 % intervals and ``permutations`` for chance, both
by ``seed``; ``system``, a name for the table. A table has its caption in ``attrs["caption"]``. What
cannot be measured is refused by a ``MoeeError``.
"""

from moee_analysis.measure.evaluation.ablation import ablation as ablation
from moee_analysis.measure.evaluation.ablation import sweeps as sweeps
from moee_analysis.measure.evaluation.accuracy import accuracy as accuracy
from moee_analysis.measure.evaluation.accuracy import agreement as agreement
from moee_analysis.measure.evaluation.architectures import (
    architecture_variants as architecture_variants,
)
from moee_analysis.measure.evaluation.architectures import architectures as architectures
from moee_analysis.measure.evaluation.latency import latency as latency
from moee_analysis.measure.evaluation.mac_table import macs as macs
from moee_analysis.measure.evaluation.trainings import Trainings as Trainings
from moee_analysis.measure.evaluation.trainings import beats_all as beats_all
from moee_analysis.measure.evaluation.trainings import fine_tuning as fine_tuning
from moee_analysis.measure.evaluation.trainings import learned as learned
from moee_analysis.measure.evaluation.trainings import learning_curves as learning_curves
from moee_analysis.measure.evaluation.trainings import trainings as trainings
from moee_analysis.measure.evaluation.trainings import which_beats_which as which_beats_which
from moee_analysis.measure.evaluation.variants import variants as variants
from moee_analysis.measure.knockout.knock_out import knock_out as knock_out
from moee_analysis.measure.knockout.knock_out import use_and_need as use_and_need
from moee_analysis.measure.knockout.knock_out import uses_and_needs as uses_and_needs
from moee_analysis.measure.knockout.parts_unseen import parts_unseen as parts_unseen
from moee_analysis.measure.routing.classes import class_distance as class_distance
from moee_analysis.measure.routing.classes import class_information as class_information
from moee_analysis.measure.routing.classes import class_relatedness as class_relatedness
from moee_analysis.measure.routing.classes import class_routing as class_routing
from moee_analysis.measure.routing.classes import specificity as specificity
from moee_analysis.measure.routing.cluster_embedding import embedding as embedding
from moee_analysis.measure.routing.cluster_embedding import surrogate as surrogate
from moee_analysis.measure.routing.experts import layers as layers
from moee_analysis.measure.routing.experts import neurons as neurons
from moee_analysis.measure.routing.experts import overlap as overlap
from moee_analysis.measure.routing.experts import similarity as similarity
from moee_analysis.measure.routing.experts import similarity_summary as similarity_summary
from moee_analysis.measure.routing.experts import sizes as sizes
from moee_analysis.measure.routing.load_balance import balance as balance
from moee_analysis.measure.routing.load_balance import routing as routing
from moee_analysis.measure.routing.part_alignment import modularity as modularity
from moee_analysis.measure.routing.part_alignment import part_profile as part_profile
from moee_analysis.measure.routing.router_regret import rerouted as rerouted
from moee_analysis.measure.routing.router_regret import router_choices as router_choices
from moee_analysis.measure.routing.router_regret import router_regret as router_regret
from moee_analysis.measure.routing.routes import Routes as Routes
from moee_analysis.measure.routing.routes import routes as routes
from moee_analysis.measure.routing.slot_contributions import contributions as contributions
from moee_analysis.measure.routing.top_patches import top_patches as top_patches
from moee_analysis.measure.routing.top_patches import typical as typical
