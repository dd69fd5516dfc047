from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from moee_analysis.clustering import ClusterConfig
from moee_analysis.config import VARIANCE_KEPT, ExtractConfig
from moee_analysis.errors import MoeeError
from moee_analysis.presets import PRESETS


@pytest.mark.parametrize(
    "wrong",
    [
        {"recipe": "worst"},
        {"noise": "ignore"},
        {"experts": "two"},
        {"preset": "huge"},
        {"macs_reduction": 28},
        {"macs_reduction": 0},
        {"macs_reduction": float("nan")},
        {"variance_kept": 90},
        {"variance_kept": -0.1},
        {"macs_reduction": 0.3, "variance_kept": 0.9},
        {"tokens_per_image": 0},
        {"cluster_tokens": -1},
        {"calibration_images": 2.5},
        {"seed": -1},
        {"seed": None},
    ],
)
def test_a_setting_that_makes_no_sense_is_refused_by_name(wrong):
    with pytest.raises(MoeeError, match=next(iter(wrong))):
        ExtractConfig(**wrong)


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(MoeeError, match="smoke, small, full"):
        ExtractConfig(preset="huge")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_preset_decides_what_is_not_given(preset):
    config = ExtractConfig(preset=preset, cluster_tokens=77).resolved()
    assert config.cluster_tokens == 77
    assert config.tokens_per_image == PRESETS[preset].tokens_per_image
    assert config.calibration_images == PRESETS[preset].calibration_images


def test_a_budget_and_a_share_of_variance_exclude_each_other():
    assert ExtractConfig().resolved().variance_kept == VARIANCE_KEPT
    assert ExtractConfig(variance_kept=0.5).resolved().variance_kept == 0.5
    assert ExtractConfig(macs_reduction=0.28).resolved().variance_kept is None


@pytest.mark.parametrize("layers", [None, (0, 3)])
def test_a_configuration_survives_the_way_through_json(layers):
    config = ExtractConfig(layers=layers, seed=5, clustering=ClusterConfig(reduce="pca")).resolved()
    assert ExtractConfig.from_json(json.loads(json.dumps(asdict(config)))) == config
