"""Which MLPs of a model can be taken apart, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from timm.layers import Mlp
from torch import nn

LEFT_OUT = {
    ("MixerBlock", "mlp_tokens"): "mixes tokens: what it would route are channels",
    ("RelPosMlp", "mlp"): "sees coordinates, not the tokens of an image",
    ("WindowMultiHeadAttention", "meta_mlp"): "sees coordinates, not the tokens of an image",
    ("SpatialTransformerBlock", "mlp"): "sees one number of every place, not its token",
}
"""MLPs that see no tokens, by the class that holds them and their name in it."""

NAMES = ("mlp", "glu", "ffn", "feedforward")
"""What is in the name of a class that is like an MLP, in lower case."""

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SurveyedMlp:
    """An MLP, or what is like one: its name in the model, its kind, why it stays as it is.

    ``kind`` is its class, for timm's ``Mlp`` with those of ``fc1`` and of the norm inside. The
    ``reason`` of one that can be taken apart is empty.
    """

    name: str
    kind: str
    reason: str = ""

    @property
    def convertible(self) -> bool:
        """Whether it can be taken apart."""
        return not self.reason


def survey(model: nn.Module) -> list[SurveyedMlp]:
    """Say of everything like an MLP in ``model``, in order, whether it can be taken apart.

    Those that can are Linear-activation-Linear (``timm.layers.Mlp``), see the tokens of an image
    and stand in one place; :func:`find_mlps` finds exactly these.
    """
    return [
        SurveyedMlp(names[0], _kind(module), _reason(model, module, names))
        for module, names in _places(model).items()
        if _is_like_mlp(module)
    ]


def is_plain_mlp(module: nn.Module) -> bool:
    """Whether ``module`` is a Linear-activation-Linear MLP and nothing else."""
    return (
        isinstance(module, Mlp)
        and isinstance(module.fc1, nn.Linear)
        and isinstance(module.fc2, nn.Linear)
        and isinstance(module.norm, nn.Identity)
    )


def _places(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below ``model``, and all names under which it stands."""
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name:
            places.setdefault(module, []).append(name)
    return places


def _is_like_mlp(module: nn.Module) -> bool:
    """Whether it is called like an MLP, and does not just hold one."""
    if isinstance(module, Mlp):
        return True
    named = any(name in type(module).__name__.lower() for name in NAMES)
    return named and not any(isinstance(child, Mlp) for child in module.children())


def _kind(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, Mlp):
        return f"{name} ({type(module.fc1).__name__}, {type(module.norm).__name__})"
    return name


def _reason(model: nn.Module, module: nn.Module, names: list[str]) -> str:
    """Why ``module`` cannot be taken apart; empty if it can."""
    parent, _, own = names[0].rpartition(".")
    if (place := (type(model.get_submodule(parent)).__name__, own)) in LEFT_OUT:
        return LEFT_OUT[place]
    if len(names) > 1:
        return f"stands in {len(names)} places with the same weights"
    if is_plain_mlp(module):
        return ""
    return next(reason for holds, reason in REASONS if holds(module))


def _called(*parts: str) -> Callable[[nn.Module], bool]:
    return lambda module: any(part in type(module).__name__.lower() for part in parts)


def _convolves(module: nn.Module) -> bool:
    return any(isinstance(part, CONVOLUTIONS) for part in module.modules())


def _norms(module: nn.Module) -> bool:
    return not isinstance(getattr(module, "norm", None), nn.Identity | None)


REASONS: tuple[tuple[Callable[[nn.Module], bool], str], ...] = (
    (_called("head"), "the classifier's head: one vector of an image, no tokens"),
    (_called("glu", "gated"), "gated: a hidden neuron is the product of two"),
    (_called("globalresponse"), "GRN inside: a hidden neuron depends on those of all tokens"),
    (_convolves, "convolutional: made of convolutions, not of Linear layers alone"),
    (_norms, "a norm inside, beside its Linear layers"),
    (lambda _: True, "not a timm.layers.Mlp"),
)
"""Why an MLP that sees tokens is not Linear-activation-Linear; the first that holds."""
