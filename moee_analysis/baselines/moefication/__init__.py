"""MoEfication: the hidden neurons of a trained MLP dealt into equal experts, k of them per token.

"MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (Zhang et al., 2022): three
ways to deal the neurons, and routers from none to a small MLP. The original wants ReLU networks;
here is also its port to vision transformers with GELU, "ViT-MoEfication", with other scores of
experts, and with the mean of what is left out. All neurons stay, so no parameters are saved.
"""

from moee_analysis.baselines.moefication.budget import matching_active
from moee_analysis.baselines.moefication.captured_score import captured, captured_mass
from moee_analysis.baselines.moefication.config import MoeficationConfig
from moee_analysis.baselines.moefication.convert import convert, oracle_routed
from moee_analysis.baselines.moefication.routers import CentreRouter, GroundTruthRouter, MlpRouter

__all__ = [
    "CentreRouter",
    "GroundTruthRouter",
    "MlpRouter",
    "MoeficationConfig",
    "captured",
    "captured_mass",
    "convert",
    "matching_active",
    "oracle_routed",
]
