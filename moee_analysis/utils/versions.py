"""Where numbers were made: versions and device."""

import os
import platform
from importlib import metadata

PACKAGE = "moee-analysis"
LIBRARIES = (
    "torch", "torchvision", "timm", "numpy", "pandas", "scikit-learn", "hdbscan", "umap-learn",
    "matplotlib", "seaborn", "papermill",
)  # fmt: skip


def versions() -> dict[str, str]:
    """Versions of this package, of Python and of the libraries that make the numbers."""
    found = {PACKAGE: version(PACKAGE), "python": platform.python_version()}
    return found | {name: version(name) for name in LIBRARIES}


def version(distribution: str = PACKAGE) -> str:
    """Version of an installed distribution."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def describe_device(device: str) -> str:
    """``device`` in words a reader of the report understands."""
    if device.startswith("cuda"):
        import torch

        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({platform.machine()}, {os.cpu_count()} cores)"
