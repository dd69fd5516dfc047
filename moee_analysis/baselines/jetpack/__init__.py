"""MoE Jetpack: a dense model's weights, recycled as the start of a mixture of soft experts.

Source: Zhu et al., "MoE Jetpack: From Dense Checkpoints to Adaptive Mixture of Experts for Vision
Tasks", NeurIPS 2024, and its released code.
"""

from moee_analysis.baselines.jetpack.config import JetpackConfig as JetpackConfig
from moee_analysis.baselines.jetpack.convert import convert as convert
from moee_analysis.baselines.jetpack.convert import narrowed as narrowed
from moee_analysis.baselines.jetpack.narrow_model import successor as successor
