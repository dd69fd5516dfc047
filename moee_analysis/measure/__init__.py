"""Measures: models and images in, tidy tables out; every one has a plot of the same name."""

from __future__ import annotations

from moee_analysis.measure.ablation import ablation as ablation
from moee_analysis.measure.ablation import sweeps as sweeps
from moee_analysis.measure.accuracy import accuracy as accuracy
from moee_analysis.measure.architectures import architecture_variants as architecture_variants
from moee_analysis.measure.architectures import architectures as architectures
from moee_analysis.measure.class_distance import class_distance as class_distance
from moee_analysis.measure.class_distance import family_separation as family_separation
from moee_analysis.measure.class_relatedness import class_relatedness as class_relatedness
from moee_analysis.measure.class_routing import class_information as class_information
from moee_analysis.measure.class_routing import class_routing as class_routing
from moee_analysis.measure.class_routing import specificity as specificity
from moee_analysis.measure.contributions import contributions as contributions
from moee_analysis.measure.experts import layers as layers
from moee_analysis.measure.experts import neurons as neurons
from moee_analysis.measure.experts import overlap as overlap
from moee_analysis.measure.experts import sizes as sizes
from moee_analysis.measure.fine_tuning import fine_tuning as fine_tuning
from moee_analysis.measure.knock_out import knock_out as knock_out
from moee_analysis.measure.latency import latency as latency
from moee_analysis.measure.learning import beats_all as beats_all
from moee_analysis.measure.learning import learned as learned
from moee_analysis.measure.learning import learning_curves as learning_curves
from moee_analysis.measure.learning import which_beats_which as which_beats_which
from moee_analysis.measure.macs import macs as macs
from moee_analysis.measure.modularity import modularity as modularity
from moee_analysis.measure.modularity import part_profile as part_profile
from moee_analysis.measure.router_regret import rerouted as rerouted
from moee_analysis.measure.router_regret import router_choices as router_choices
from moee_analysis.measure.router_regret import router_regret as router_regret
from moee_analysis.measure.routes import Routes as Routes
from moee_analysis.measure.routes import routes as routes
from moee_analysis.measure.routing import balance as balance
from moee_analysis.measure.routing import routing as routing
from moee_analysis.measure.similarity import similarity as similarity
from moee_analysis.measure.similarity import similarity_summary as similarity_summary
from moee_analysis.measure.trainings import Trainings as Trainings
from moee_analysis.measure.trainings import trainings as trainings
from moee_analysis.measure.typical import top_patches as top_patches
from moee_analysis.measure.typical import typical as typical
from moee_analysis.measure.use_and_need import use_and_need as use_and_need
from moee_analysis.measure.use_and_need import uses_and_needs as uses_and_needs
from moee_analysis.measure.variants import variants as variants
from moee_analysis.measure.walkthrough import embedding as embedding
from moee_analysis.measure.walkthrough import surrogate as surrogate
