"""A model of one's own, and its run, as commands make them."""

import json
from contextlib import redirect_stdout

import pytest
import torch

from moee_analysis.models import class_names
from tests.helpers.calls import extraction, run_cli
from tests.helpers.images import image_folder
from tests.helpers.models import lively


@pytest.fixture(scope="session")
def own(tmp_path_factory):
    """A tuned model of another size, with one channel and three classes, and pictures of them."""
    root = tmp_path_factory.mktemp("own")
    tensors = lively(num_classes=3, in_chans=1, img_size=64).state_dict()
    behind = {f"module.{name}": tensor for name, tensor in tensors.items()}
    torch.save({"state_dict": behind, "epoch": 3}, root / "tuned.pth")  # as a script saved it
    (root / "classes.txt").write_text("zebra\nant\nyak\n")
    sizes = {"calibration": 12, "evaluation": 5, "train": 6}
    for place, (name, each) in enumerate(sizes.items()):
        image_folder(root / name, dict.fromkeys(("ant", "yak", "zebra"), each), first=300 * place)
    image_folder(root / "one_class", {"zebra": 6}, first=900)
    return root


@pytest.fixture(scope="session")
def run(own):
    """The folder of its run, not to be changed; ``numbers.json`` and ``told.txt`` lie beside."""
    class_names._tell_once.cache_clear()
    options = ["--recipe", "best", "--macs-reduction", 0.3, "--attention", "low_rank"]
    with (own / "told.txt").open("w") as told, redirect_stdout(told):
        assert run_cli(*extraction(own, *options, "--out", own / "run")) == 0
    command = ["evaluate", own / "run", "--images", own / "evaluation"]
    assert run_cli(*command, "--json", own / "numbers.json") == 0
    return own / "run"


@pytest.fixture(scope="session")
def numbers(run):
    """What ``evaluate`` finds of it."""
    return json.loads((run.parent / "numbers.json").read_text())
