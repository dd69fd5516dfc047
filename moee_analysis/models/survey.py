"""Which MLPs of a model can be taken apart, and why the others cannot."""

from dataclasses import dataclass

from timm.layers import Mlp
from torch import nn

COORDINATES = "sees coordinates, not the tokens of an image"
LEFT_OUT = {  # MLPs that see no tokens, by the class that holds them and their name in it
    ("MixerBlock", "mlp_tokens"): "mixes tokens: what it would route are channels",
    ("RelPosMlp", "mlp"): COORDINATES,
    ("WindowMultiHeadAttention", "meta_mlp"): COORDINATES,
    ("SpatialTransformerBlock", "mlp"): "sees one number of every place, not its token",
}
NAMES = ("mlp", "glu", "ffn", "feedforward")  # in that of a class that is like an MLP
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class SurveyedMlp:
    """An MLP, or what is like one: its name in the model, its kind, why it stays as it is.

    ``kind`` is its class, for timm's ``Mlp`` with those of ``fc1`` and of the norm inside.
    """

    name: str
    kind: str
    reason: str = ""

    @property
    def convertible(self) -> bool:
        """Whether it can be taken apart, for want of a reason."""
        return not self.reason


def survey(model: nn.Module) -> list[SurveyedMlp]:
    """Say of everything like an MLP in ``model``, in order, whether it can be taken apart.

    Those that can are Linear-activation-Linear, see the tokens of an image and stand in one place.
    """
    places: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        places.setdefault(module, []).append(name)
    del places[model]
    found = []
    for module, names in places.items():
        kind = type(module).__name__
        if isinstance(module, Mlp):
            kind += f" ({type(module.fc1).__name__}, {type(module.norm).__name__})"
        elif not _is_called(module, *NAMES) or any(isinstance(c, Mlp) for c in module.children()):
            continue  # not called like an MLP, or just holds one
        found.append(SurveyedMlp(names[0], kind, _reason(model, module, names)))
    return found


def _reason(model: nn.Module, module: nn.Module, names: list[str]) -> str:
    parent, _, own = names[0].rpartition(".")
    if (place := (type(model.get_submodule(parent)).__name__, own)) in LEFT_OUT:
        return LEFT_OUT[place]
    if len(names) > 1:
        return f"stands in {len(names)} places with the same weights"
    linear = isinstance(module, Mlp) and isinstance(module.norm, nn.Identity)
    if linear and all(isinstance(part, nn.Linear) for part in (module.fc1, module.fc2)):
        return ""
    normed = _is_called(module, "globalresponse")
    convolutional = any(isinstance(part, CONVOLUTIONS) for part in module.modules())
    norm = getattr(module, "norm", None)
    reasons = {
        "the classifier's head: one vector of an image, no tokens": _is_called(module, "head"),
        "gated: a hidden neuron is the product of two": _is_called(module, "glu", "gated"),
        "GRN inside: a hidden neuron depends on those of all tokens": normed,
        "convolutional: made of convolutions, not of Linear layers alone": convolutional,
        "a norm inside, beside its Linear layers": not isinstance(norm, nn.Identity | None),
        "not a timm.layers.Mlp": True,
    }
    return next(reason for reason, holds in reasons.items() if holds)


def _is_called(module: nn.Module, *parts: str) -> bool:
    return any(part in type(module).__name__.lower() for part in parts)
