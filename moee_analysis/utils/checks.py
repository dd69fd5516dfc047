"""Checks of settings, of all configurations and of the command line."""

import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import partial
from numbers import Integral, Real
from operator import ge, gt, le, lt
from typing import Any, Literal, get_args, get_origin, get_type_hints

from moee_analysis.errors import MoeeError

MOST = 10**9  # no count and no factor is larger, unless something was mistyped
HOLDS = {"above": gt, "least": ge, "below": lt, "most": le}
WORDS = {"least": "at least", "most": "at most"}
LAST_SEED = 2**32 - 1  # the largest that NumPy takes


def whole_number(name: str, value: Any, *, least: int = 1, most: int = MOST) -> None:
    """Refuse anything but a whole number from ``least`` to ``most``."""
    if not _is(Integral, value) or not least <= value <= most:
        _refuse(name, f"a whole number from {least} to {most}", value)


def seed_number(value: Any, name: str = "seed") -> None:
    """Refuse anything but a seed of NumPy and PyTorch."""
    whole_number(name, value, least=0, most=LAST_SEED)


def draw_numbers(seed: Any, **counts: Any) -> None:
    """Refuse anything but a ``seed``, and ``counts`` of draws, by name, below 1."""
    for name, value in counts.items():
        whole_number(name, value)
    seed_number(seed)


def real_number(name: str, value: Any, **bounds: float) -> None:
    """Refuse anything but a number within ``bounds``, by default up to a billion; NaN never is."""
    if not {"below", "most"} & bounds.keys():
        bounds["most"] = MOST
    if not _is(Real, value) or not all(HOLDS[key](value, bound) for key, bound in bounds.items()):
        words = " and ".join(f"{WORDS.get(key, key)} {bound:g}" for key, bound in bounds.items())
        _refuse(name, f"a number {words}", value)


def share(name: str, value: Any, *, whole: bool = True) -> None:
    """Refuse anything but a share above 0 and up to 1 or, unless ``whole`` can be, below 1."""
    if not _is(Real, value) or not 0 < value <= 1 or (value == 1 and not whole):
        _refuse(name, f"a share in (0, 1{']' if whole else ')'}", value, hint="0.28 means 28 %")


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Refuse anything but one of the ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise MoeeError(f"{name} among {', '.join(choices)}", reprlib.repr(value), "name one")


def choices_of(settings: type) -> dict[str, tuple[str, ...]]:
    """The settings of a dataclass that are chosen by name, and their names."""
    hints = get_type_hints(settings).items()
    pairs = ((name, each) for name, hint in hints for each in (hint, *get_args(hint)))
    return {name: get_args(each) for name, each in pairs if get_origin(each) is Literal}


def layer_numbers(value: Any) -> None:
    """Refuse ``layers`` that are neither None nor numbers of layers, counted from 0."""
    if value is not None and (not isinstance(value, Sequence) or isinstance(value, str)):
        _refuse("layers", "a tuple of numbers, counted from 0", value)
    for number in value or ():
        whole_number("layers", number, least=0)


def not_none(config: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """Yield the settings of a configuration that are not None, with their names."""
    return ((name, getattr(config, name)) for name in names if getattr(config, name) is not None)


RANGES: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(("experts", "n_experts", "k", "slots", "tokens", "width"), whole_number),
    **dict.fromkeys(("steps", "check_every", "epochs", "patience"), whole_number),
    **dict.fromkeys(("batch_size", "accumulate"), whole_number),
    **dict.fromkeys(("core", "universal"), partial(whole_number, least=0)),
    "seed": partial(whole_number, least=0, most=LAST_SEED),
    "layers": lambda _, value: layer_numbers(value),
    **dict.fromkeys(("active", "universal_ratio", "layer_decay"), share),
    **dict.fromkeys(("macs_reduction", "ema", "held_out"), partial(share, whole=False)),
    **dict.fromkeys(("capacity", "temperature"), partial(real_number, above=0)),
    **dict.fromkeys(("learning_rate", "clip"), partial(real_number, above=0)),
    **dict.fromkeys(("noise", "weight_decay", "warmup_epochs"), partial(real_number, least=0)),
    **dict.fromkeys(("block_weight", "router_weight"), partial(real_number, least=0)),
    **dict.fromkeys(("balance_weight", "mixup", "cutmix"), partial(real_number, least=0)),
    **dict.fromkeys(("drop", "expert_drop"), partial(real_number, least=0, below=1)),
    **dict.fromkeys(("warmup", "label_smoothing"), partial(real_number, least=0, below=1)),
}
"""What checks settings that are numbers, by names that mean the same in all configurations."""


def check_settings(config: Any) -> None:
    """Refuse single settings that no configuration can have; None only where it is the default."""
    for name, choices in choices_of(type(config)).items():
        one_of(name, getattr(config, name), choices)
    for field in fields(config):
        value = getattr(config, field.name)
        if field.name in RANGES and (value is not None or field.default is not None):
            RANGES[field.name](field.name, value)


def _is(kind: type, value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _refuse(name: str, expected: str, found: Any, *, hint: str = "correct it") -> None:
    raise MoeeError(f"{name} as {expected}" if name else expected, reprlib.repr(found), hint)
