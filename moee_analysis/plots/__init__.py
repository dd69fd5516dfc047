"""Figures of the tables of ``measure``, by the same names, and what they show in words."""

from __future__ import annotations

from moee_analysis.plots import style as style
from moee_analysis.plots.ablation import ablation as ablation
from moee_analysis.plots.accuracy import accuracy as accuracy
from moee_analysis.plots.accuracy import comparison as comparison
from moee_analysis.plots.accuracy import routing_controls as routing_controls
from moee_analysis.plots.architectures import architecture_variants as architecture_variants
from moee_analysis.plots.architectures import architectures as architectures
from moee_analysis.plots.architectures import macs as macs
from moee_analysis.plots.classes import class_distance as class_distance
from moee_analysis.plots.classes import class_information as class_information
from moee_analysis.plots.classes import class_relatedness as class_relatedness
from moee_analysis.plots.classes import class_routing as class_routing
from moee_analysis.plots.classes import specificity as specificity
from moee_analysis.plots.experts import embedding as embedding
from moee_analysis.plots.experts import layers as layers
from moee_analysis.plots.experts import neurons as neurons
from moee_analysis.plots.experts import overlap as overlap
from moee_analysis.plots.experts import similarity as similarity
from moee_analysis.plots.experts import similarity_summary as similarity_summary
from moee_analysis.plots.experts import sizes as sizes
from moee_analysis.plots.experts import surrogate as surrogate
from moee_analysis.plots.knock_out import class_knock_out as class_knock_out
from moee_analysis.plots.knock_out import knock_out as knock_out
from moee_analysis.plots.knock_out import use_and_need as use_and_need
from moee_analysis.plots.parts import modularity as modularity
from moee_analysis.plots.parts import part_profile as part_profile
from moee_analysis.plots.parts import parts_unseen as parts_unseen
from moee_analysis.plots.pictures import image_layers as image_layers
from moee_analysis.plots.pictures import patches as patches
from moee_analysis.plots.pictures import top_patches as top_patches
from moee_analysis.plots.routing import balance as balance
from moee_analysis.plots.routing import router_regret as router_regret
from moee_analysis.plots.routing import routing as routing
from moee_analysis.plots.sweeps import sweeps as sweeps
from moee_analysis.plots.text import describe as describe
from moee_analysis.plots.training import contributions as contributions
from moee_analysis.plots.training import fine_tuning as fine_tuning
from moee_analysis.plots.training import history as history
from moee_analysis.plots.training import learned as learned
from moee_analysis.plots.training import learning_curves as learning_curves
from moee_analysis.plots.training import which_beats_which as which_beats_which
