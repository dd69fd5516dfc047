"""What became of one MLP layer."""

from dataclasses import dataclass
from typing import Any, Self

REMOVED = ("thin", "dense_tokens")
"""Fields of earlier versions, which say nothing of how a run is loaded."""


@dataclass(frozen=True)
class LayerReport:
    """What became of one MLP layer.

    ``noise_share`` is the share of clustered tokens in no cluster, ``route_agreement`` the share
    of clustered tokens that the router sends to their own cluster, ``active_fraction`` the
    expected share of hidden neurons a token uses, ``union_fraction`` the share still stored.
    """

    index: int
    name: str
    hidden: int
    converted: bool
    reason: str
    experts: int = 0
    noise_share: float = 0.0
    route_agreement: float = 1.0
    active_fraction: float = 1.0
    union_fraction: float = 1.0
    sizes: tuple[int, ...] = ()

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Self:
        """Rebuild a report from ``dataclasses.asdict`` after a trip through JSON."""
        known = {name: value for name, value in content.items() if name not in REMOVED}
        return cls(**known | {"sizes": tuple(known["sizes"])})
