"""Three files say what this project installs; they must not drift apart."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from moee_analysis.models.loading import BUNDLED_MODELS

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, TOOLS = PYPROJECT["project"], PYPROJECT["tool"]
CONDA_NAMES = {
    "pytorch": "torch", "huggingface_hub": "huggingface-hub",
    "python-fastjsonschema": "fastjsonschema",
}  # fmt: skip
CONDA_ONLY = {"python", "pip"}
CARD = {
    "python", "pytorch", "timm", "hdbscan", "umap-learn", "matplotlib", "seaborn", "jupyterlab",
    "papermill",
}  # fmt: skip
PLATFORM_ONLY = re.compile(r"^(nvidia|cuda|triton)")


def _requirements() -> dict[str, SpecifierSet]:
    """Every dependency of the package, the development ones among them, and its range."""
    texts = PROJECT["dependencies"] + PROJECT["optional-dependencies"]["dev"]
    parsed = [Requirement(text) for text in texts]
    return {canonicalize_name(r.name): r.specifier for r in parsed}


def _constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def _conda() -> dict[str, SpecifierSet]:
    text = (ROOT / "environment.yml").read_text()
    found = re.findall(r"^  - ([a-z0-9_-]+)(?: (\S+))?$", text.partition("dependencies:")[2], re.M)
    return {name: SpecifierSet(version) for name, version in found}


REQUIREMENTS = _requirements()


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_the_tested_version_of_a_dependency_lies_in_its_range(name):
    assert _constraints()[name] in REQUIREMENTS[name]


@pytest.mark.parametrize("name", REQUIREMENTS)
def test_a_dependency_is_in_the_conda_environment_with_the_same_range(name):
    conda = {CONDA_NAMES.get(name, name): version for name, version in _conda().items()}
    assert conda[name] == REQUIREMENTS[name]


def test_the_conda_environment_holds_nothing_else_and_the_nine_of_the_card():
    conda = _conda()
    assert {CONDA_NAMES.get(name, name) for name in conda} - CONDA_ONLY == set(REQUIREMENTS)
    assert set(conda) >= CARD
    assert "- -e ." in (ROOT / "environment.yml").read_text()


def test_the_conda_environment_has_a_python_the_package_takes():
    lowest = "3.11"
    assert lowest in _conda()["python"]
    assert lowest in SpecifierSet(PROJECT["requires-python"])


def test_torch_and_torchvision_are_a_pair():
    """torchvision 0.(n + 15) belongs to torch 2.n, patch by patch, tested and at the least."""
    tested = _constraints()
    minor, patch = tested["torch"].split(".")[1:]
    assert tested["torchvision"] == f"0.{int(minor) + 15}.{patch}"
    least = {n: next(iter(REQUIREMENTS[n])).version for n in ("torch", "torchvision")}
    assert least["torchvision"] == f"0.{int(least['torch'].split('.')[1]) + 15}"


def test_the_pins_are_exact_and_of_every_platform():
    assert not [name for name in _constraints() if PLATFORM_ONLY.match(name)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert all(line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)


def test_the_wheel_holds_every_bundled_model_and_its_card():
    wheel = TOOLS["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["data"] == "moee_analysis/shipped/data"
    files = {f"{name}.{ending}" for name in BUNDLED_MODELS for ending in ("json", "safetensors")}
    assert {path.name for path in (ROOT / "data").iterdir()} == files


def test_the_licence_is_the_one_declared():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in text
    assert "Version 2.0, January 2004" in text
