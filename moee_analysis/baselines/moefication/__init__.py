"""MoEfication: the hidden neurons of a trained MLP dealt into equal experts, k of them per token.

"MoEfication: Transformer Feed-forward Layers are Mixtures of Experts" (Zhang et al., 2022): three
ways to deal the neurons, and routers from none to a small MLP. The original wants ReLU networks;
here is also its port to vision transformers with GELU, "ViT-MoEfication", with other scores of
experts, and with the mean of what is left out. All neurons stay, so no parameters are saved.
"""

from moee_analysis.baselines.moefication.config import MoeficationConfig as MoeficationConfig
from moee_analysis.baselines.moefication.convert import convert as convert
from moee_analysis.baselines.moefication.convert import matching_active as matching_active
from moee_analysis.baselines.moefication.convert import oracle_routed as oracle_routed
from moee_analysis.baselines.moefication.routers import CentreRouter as CentreRouter
from moee_analysis.baselines.moefication.routers import GroundTruthRouter as GroundTruthRouter
from moee_analysis.baselines.moefication.routers import MlpRouter as MlpRouter
