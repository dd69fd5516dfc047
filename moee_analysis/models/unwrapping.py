"""The network itself, inside what training and compiling wrap around it."""

import copy

from timm.utils import ModelEma, ModelEmaV2, ModelEmaV3
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

WRAPPERS = {  # modules that only pass images on, and the name of the network in each
    OptimizedModule: "_orig_mod",
    DataParallel: "module",
    DistributedDataParallel: "module",
    AveragedModel: "module",
    ModelEma: "ema",
    ModelEmaV2: "module",
    ModelEmaV3: "module",
}


def inside(model: nn.Module) -> nn.Module:
    """Return the network within its outer wrappers; its parts stay as they are."""
    while type(model) in WRAPPERS:
        model = getattr(model, WRAPPERS[type(model)])
    return model


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network that ``torch.compile``, ``DataParallel`` and the like are wrapped around.

    One with wrapped parts is copied without them: modules are found and replaced by their names.
    """
    network = inside(model)
    wrapped = [part for part in network.modules() if type(part) in WRAPPERS]
    if not wrapped:
        return network
    copies: dict[int, nn.Module] = {}
    for part in reversed(wrapped):  # the innermost first
        copies[id(part)] = copy.deepcopy(inside(part), copies)
    return copy.deepcopy(network, copies)


def stated_modules(model: nn.Module, entry: str) -> dict[str, nn.Module]:
    """Return the modules that ``pretrained_cfg[entry]`` names, such as "classifier", if any."""
    network = inside(model)
    modules, names = dict(network.named_modules()), network.pretrained_cfg.get(entry) or ()
    names = [names] if isinstance(names, str) else names
    return {name: modules[name] for name in names if name in modules}
