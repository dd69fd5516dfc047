"""Token merging as an optional stage: how many patches become one in each block."""

from collections.abc import Callable

from torch import nn

from moee_analysis.extraction.record.tokens import prefix_kinds
from moee_analysis.models.merge_costs import WardCosts


def merge_costs_of(model: nn.Module) -> Callable[[int], nn.Module]:
    """What merging costs in each block of a ``model``: by CLS attention where CLS is read."""
    by_cls = "cls" in prefix_kinds(model) and model.global_pool == "token"
    return lambda _: WardCosts(by_importance=by_cls)
