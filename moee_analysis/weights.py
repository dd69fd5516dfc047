"""State dicts from files: safetensors, or a .pth of nothing but tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open

from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import nn


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a state dict and its metadata from ``.safetensors``, or from ``.pth`` (tensors only).

    Raises
    ------
    MoeeError
        Missing, truncated or foreign file.
    """
    if not path.is_file():
        raise MoeeError(f"a weights file at '{path}'", "no such file", "check the path")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _read_pth(path), {}


def load_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Load a complete state dict into ``model``; every name and shape must fit.

    Raises
    ------
    MoeeError
        Names or shapes differ; the message lists the first of them.
    """
    own = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    wrong = [f"{n} missing" for n in own if n not in given]
    wrong += [f"{n} not in the model" for n in given if n not in own]
    wrong += [f"{n} is {given[n]}, not {own[n]}" for n in own if given.get(n, own[n]) != own[n]]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise MoeeError(
            f"the tensors of {type(model).__name__} in '{source}'",
            "; ".join(wrong[:3]) + more,
            "check that the file belongs to this architecture",
        )
    model.load_state_dict(tensors)


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise MoeeError(
            f"a complete safetensors file at '{path}'", str(error), "fetch or save it again"
        ) from None


def _read_pth(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can break the reader in any way
        raise MoeeError(
            f"a checkpoint of tensors at '{path}'",
            f"something else ({type(error).__name__})",
            "save the state dict alone, best as .safetensors",
        ) from None
    content = _unwrapped(content)
    if not isinstance(content, dict) or not all(torch.is_tensor(t) for t in content.values()):
        raise MoeeError(
            f"a state dict (name -> tensor) in '{path}'",
            f"a {type(content).__name__}",
            "save model.state_dict(), not the model",
        )
    return content


def _unwrapped(content: Any) -> Any:
    """The state dict inside the wrappers that training scripts commonly write."""
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            return content[key]
    return content
