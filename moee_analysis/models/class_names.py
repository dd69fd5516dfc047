"""The classes of a model: their names, where these come from, and that there is one an output."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import evaluating
from moee_analysis.models.inputs import DOES_NOT_FIT, blank, misfit
from moee_analysis.models.unwrapping import inside, stated_modules
from moee_analysis.outside_text import printable
from moee_analysis.utils.progress import tell
from moee_analysis.utils.storage.files import read_json, read_text

NAME_THEM = (
    "name its classes in the order of its outputs: --classes FILE (one name a line, or JSON), or "
    "moee.name_classes(model, names)"
)
CLASSIFIER = "a classifier with a score for each of its classes"
NO_LABELS = "measure what needs no labels (routing, similarity, agreement), or take a classifier"
FORMS = "write one name a line, or JSON: a list, or an object of indices and names"


def class_names(model: nn.Module, *, readable: bool = False) -> tuple[str, ...]:
    """Names of the model's classes in the order of its outputs; wnids, or ``readable`` names.

    Raises MoeeError: it does not say which classes it knows, or has not one output for each.
    """
    network, outputs = inside(model), count_classes(model)
    names = tuple(map(printable, network.pretrained_cfg.get("label_names") or ()))
    if names and readable:
        names = tuple(name.replace("_", " ") for name in names)
    elif not names:
        subset = infer_imagenet_subset(network) if getattr(network, "num_classes", 0) else None
        if subset is None:
            found = f"{outputs} outputs without names"
            raise MoeeError("a model that says which classes it knows", found, NAME_THEM)
        names = _imagenet_names(subset)[readable]
    if len(names) != outputs:
        expected = f"an output for each of the {len(names)} classes the model names"
        raise MoeeError(f"{expected} ({_shorten(names)})", f"{outputs} outputs", NAME_THEM)
    return names


def class_labels(model: nn.Module) -> tuple[str, ...]:
    """Readable names of the model's classes, in the order of its outputs; raises as above."""
    return class_names(model, readable=True)


def knows_classes(model: nn.Module) -> bool:
    """Whether :func:`class_names` has an answer."""
    with suppress(MoeeError):
        return bool(class_names(model))
    return False


def is_classifier(model: nn.Module) -> bool:
    """Whether :func:`count_classes` has an answer."""
    with suppress(MoeeError):
        return bool(count_classes(model))
    return False


def count_classes(model: nn.Module) -> int:
    """Outputs of a classifier, counted by running it on a black image.

    Raises MoeeError: the model has no head, a single output, or other outputs than scores.
    """
    network = inside(model)
    heads = stated_modules(network, "classifier").values()
    if getattr(network, "num_classes", None) == 0 or any(isinstance(h, nn.Identity) for h in heads):
        raise MoeeError(CLASSIFIER, "none (num_classes=0): its outputs are features", NO_LABELS)
    with evaluating(network):
        try:
            outputs = network(blank(network))
        except DOES_NOT_FIT as error:
            raise misfit(network, error) from None
    if not torch.is_tensor(outputs) or outputs.ndim != 2:
        shape = tuple(outputs.shape) if torch.is_tensor(outputs) else type(outputs).__name__
        raise MoeeError(CLASSIFIER, f"outputs of an image that are {shape}", NO_LABELS)
    if outputs.shape[1] < 2:
        raise MoeeError(CLASSIFIER, "a single output, such as a regression has", NO_LABELS)
    return outputs.shape[1]


def name_classes(model: nn.Module, names: Sequence[str]) -> None:
    """Give a classifier the names of its classes, one for each output, in their order."""
    network, outputs = inside(model), count_classes(model)
    twice = len(names) - len(set(names))
    if len(names) != outputs or twice or "" in names:
        found = f"{len(names)}" + (f", {twice} of them more than once" if twice else "")
        expected = f"one name for each of the model's {outputs} outputs"
        raise MoeeError(expected, found, "list every class once, in the order of the outputs")
    network.pretrained_cfg = {**network.pretrained_cfg, "label_names": tuple(names)}


def name_by_folders(model: nn.Module, folders: Sequence[str]) -> None:
    """Let a classifier that names no classes have the names of :func:`_names_by_folders`."""
    if names := _names_by_folders(model, folders):
        name_classes(model, names)


def _names_by_folders(model: nn.Module, folders: Sequence[str]) -> tuple[str, ...]:
    """Class ``folders`` as names of a classifier that has none, in the order of the alphabet.

    Empty where the model has names, or another number of outputs.
    """
    names, count = tuple(sorted(folders)), len(folders)
    if knows_classes(model) or not is_classifier(model) or count_classes(model) != count:
        return ()
    _tell_once(
        f"the model's {count} classes have no names: they are taken to be the {count} class "
        f"folders in the order of the alphabet, {_shorten(names)}"
    )
    return names


def index_of_classes(model: nn.Module, folders: Sequence[str]) -> dict[str, int]:
    """Name -> index of the model's classes, by names and by readable labels.

    Names stand there as they are and, where no two are alike, as :func:`plain_name`. They are
    class ``folders`` in their order where the model names none.
    """
    names = _names_by_folders(model, folders)
    listed = [names] if names else [class_labels(model), class_names(model)]
    plain = [[plain_name(name) for name in names] for names in listed]
    index_of = {}
    for names in (*plain, *listed):
        seen = Counter(names)  # a name that two classes share (ImageNet's two cranes) is left out
        index_of |= {name: i for i, name in enumerate(names) if seen[name] == 1}
    return index_of


def plain_name(name: str) -> str:
    """``name`` without differences of case, punctuation and Unicode normal form."""
    return re.sub(r"[\W_]+", "_", unicodedata.normalize("NFC", name).casefold())


def read_class_names(path: str | Path) -> tuple[str, ...]:
    """Read names of classes: one a line, or JSON, a list or like ``id2label``, ``class_to_idx``."""
    path = Path(path)
    text = read_text(path, expected="a text file of class names", hint=FORMS)
    if path.suffix.lower() == ".json" or text.lstrip()[:1] in ("[", "{"):
        names = _list_names(read_json(path, expected="a file of class names", hint=FORMS))
    else:
        names = [line for line in text.splitlines() if line.strip()]
    if names and all(isinstance(name, str) for name in names):
        return tuple(map(str.strip, names))
    raise MoeeError(f"class names in '{path}'", "other things" if names else "none", FORMS)


@cache
def _imagenet_names(subset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Wnids and readable names of one of ImageNet's subsets; timm reads them from files."""
    info = ImageNetInfo(subset)
    labels = tuple(text.split(",")[0] for text in info.label_descriptions())
    return tuple(info.label_names()), labels


def _list_names(content: object) -> list[object]:
    if isinstance(content, list):
        return content
    if not isinstance(content, dict):
        return []
    for key in ("id2label", "label_names", "classes"):  # in a configuration beside other things
        if isinstance(content.get(key), list | dict):
            return _list_names(content[key])
    if all(type(index) is int for index in content.values()):  # class_to_idx
        content = {str(index): name for name, index in content.items()}
    return [content.get(str(index)) for index in range(len(content))]


def _shorten(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


_tell_once = cache(tell)
