"""Settings that cluster in a second, and runs with layers given by hand."""

import json

import torch
from safetensors.torch import load_file, save_file

from moee_analysis.extraction.config import ClusterConfig, ExtractConfig
from moee_analysis.extraction.run import FACTS, TENSORS, Extraction, describe_origin, load
from moee_analysis.extraction.saving.checks import report_mlp
from moee_analysis.models.macs import moe_macs
from moee_analysis.moe.layer import all_mlps, expert_layers
from moee_analysis.utils.storage.files import checksum, file_hash
from tests.helpers.images import toy_images
from tests.helpers.models import pixels_of, same_models

CLUSTERING = ClusterConfig(
    reduce="pca", components=4, min_samples=3, min_cluster_size=0.05, max_cluster_size=0.6,
    max_noise=0.95,
)  # fmt: skip


MEANS = ClusterConfig(
    method="kmeans", space="inputs", reduce="none", count=4, min_samples=3, components=4
)


def quick(**settings) -> ExtractConfig:
    """A configuration that takes a small model apart in well under a second."""
    defaults = {"tokens_per_image": 6, "cluster_tokens": 200, "clustering": CLUSTERING}
    if "macs_reduction" not in settings:
        defaults["variance_kept"] = 0.8
    return ExtractConfig(**{**defaults, **settings})


def best(**settings) -> ExtractConfig:
    """The recipe ``best`` with few experts, for models that are small."""
    return ExtractConfig(**{"recipe": "best", "clustering": MEANS, **settings})


def run_of(model) -> Extraction:
    """A run whose ``model`` has been given its routed layers by hand."""
    mlps = enumerate(all_mlps(model).items())
    reports = tuple(report_mlp(index, name, mlp) for index, (name, mlp) in mlps)
    config = quick().resolved()
    return Extraction(model, config, 0.8, reports, describe_origin(model, toy_images(6), config))


def cost(run) -> float:
    """MACs of one image, with experts used as on the calibration images."""
    layers = expert_layers(run.model).items()
    return moe_macs(run.model, {name: layer.macs_per_token() for name, layer in layers})


def saved_and_loaded(run, folder, *, dense=None) -> Extraction:
    """``run`` after a way through ``folder``, the same bit for bit."""
    run.save(folder)
    loaded, x = load(folder, dense=dense), pixels_of(run.model)
    assert same_models(loaded.model, run.model)
    assert torch.equal(loaded.model(x), run.model(x))
    assert (loaded.config, loaded.variance_kept) == (run.config, run.variance_kept)
    assert (loaded.layers, loaded.provenance) == (run.layers, run.provenance)
    return loaded


def parts_of(folder):
    """What is in the files of a run: facts, and tensors."""
    return json.loads((folder / FACTS).read_text()), load_file(folder / TENSORS)


def write_parts(folder, facts, tensors):
    """Make both checksums anew, as a tool does that knows how."""
    folder.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / TENSORS)
    facts = {key: value for key, value in facts.items() if key != "checksum"}
    if "tensors_sha256" in facts:
        facts["tensors_sha256"] = file_hash(folder / TENSORS)
    (folder / FACTS).write_text(json.dumps(facts | {"checksum": checksum(facts)}))
    return folder
