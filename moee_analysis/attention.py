"""Self-attention whose heads have fewer dimensions, and that only tokens ask that are read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import Attention
from torch import nn
from torch.nn.utils import skip_init

from moee_analysis.counting import count_parameters
from moee_analysis.errors import MoeeError

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class AttentionSite:
    """One dense self-attention: its name in the model, its sizes and its stored parameters."""

    name: str
    dim: int
    heads: int
    head_dim: int
    parameters: int

    def macs(self, tokens: int) -> int:
        """MACs of one image of so many tokens."""
        return 2 * self.heads * self.head_dim * tokens * (2 * self.dim + tokens)

    def module(self, model: nn.Module) -> nn.Module:
        """Return the module at this place of ``model``."""
        return model.get_submodule(self.name)


def find_attentions(model: nn.Module) -> list[AttentionSite]:
    """Find every plain self-attention (``timm.layers.Attention``), in order.

    Raises
    ------
    MoeeError
        The model has none: no attention, or one with windows, rotary embeddings or norms inside.
    """
    named = [(name, m) for name, m in model.named_modules() if _is_plain(m)]
    if not named:
        raise MoeeError(
            "a model with plain self-attention (timm.layers.Attention)",
            f"none in {type(model).__name__}",
            'leave its attention dense: attention="dense"',
        )
    return [site_of(name, m) for name, m in named]


def site_of(name: str, attention: Attention) -> AttentionSite:
    """Describe a dense attention and its place in a model."""
    dim, parameters = attention.proj.out_features, count_parameters(attention)
    return AttentionSite(name, dim, attention.num_heads, attention.head_dim, parameters)


def reduced_attentions(model: nn.Module) -> dict[str, LowRankAttention]:
    """Return the attentions of lower rank, or with fewer queries, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankAttention)}


def _is_plain(module: nn.Module) -> bool:
    """Whether scores are q k^T, outputs A v, and nothing stands in between."""
    if type(module) is not Attention or getattr(module, "gate", None) is not None:
        return False
    between = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm")]
    plain = all(m is None or isinstance(m, nn.Identity) for m in between)
    return plain and module.qkv.in_features == module.proj.out_features


def heads_of(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries (scaled), keys and values of every head, each (images, heads, tokens, head_dim)."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q * attention.scale, k, v


@dataclass(frozen=True)
class Ranks:
    """The shape of a :class:`LowRankAttention`.

    ``scores`` and ``values`` are dimensions that each head has for comparing tokens, and for what
    they pass on. Only the first ``queries`` tokens are asked for; None: all.
    """

    scores: tuple[int, ...]
    values: tuple[int, ...]
    queries: int | None = None


class LowRankAttention(nn.Module):
    """Self-attention with as few dimensions in every head as it needs.

    Takes and gives what timm's ``Attention`` does, without a mask. The outputs of tokens beyond
    the first ``queries`` are zeros.

    Parameters
    ----------
    site
        The dense attention that this one stands in for.
    ranks
        How many dimensions there are.
    bias
        Whether queries have a bias. Keys need none (it is the same for all scores of a query, and
        softmax takes it away); that of values goes through the attention into the output's.
    """

    def __init__(self, site: AttentionSite, ranks: Ranks, *, bias: bool) -> None:
        super().__init__()
        self.site, self.ranks = site, ranks
        self.q = skip_init(nn.Linear, site.dim, sum(ranks.scores), bias=bias)
        self.k = skip_init(nn.Linear, site.dim, sum(ranks.scores), bias=False)
        self.v = skip_init(nn.Linear, site.dim, sum(ranks.values), bias=False)
        self.proj = skip_init(nn.Linear, sum(ranks.values), site.dim)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Map tokens (images, tokens, dim) to the same shape.

        Raises
        ------
        MoeeError
            A mask is given, or asked for.
        """
        if attn_mask is not None or any(others.values()):  # is_causal
            raise MoeeError("attention without a mask", "one", "leave the attention dense")
        read = x[:, : self.ranks.queries]
        scores = self.ranks.scores
        heads = zip(
            self.q(read).split(scores, dim=-1),
            self.k(x).split(scores, dim=-1),
            self.v(x).split(self.ranks.values, dim=-1),
            strict=True,
        )
        seen = [(q @ k.mT).softmax(dim=-1) @ v for q, k, v in heads]
        out = self.proj(torch.cat(seen, dim=-1))
        unread = out.new_zeros(len(x), x.shape[1] - read.shape[1], out.shape[-1])
        return torch.cat([out, unread], dim=1)


@dataclass(frozen=True)
class Factors:
    """Low-rank maps left right^T in the place of identities, one for each head.

    ``left`` and ``right`` are (head_dim, rank), of any device and precision.
    """

    left: Sequence[torch.Tensor]
    right: Sequence[torch.Tensor]

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of every head."""
        return tuple(each.shape[1] for each in self.left)


@dataclass(frozen=True)
class Reduction:
    """What a low-rank attention does otherwise than the dense one.

    With ``scores`` M, those of a query q and a key k are q M k^T. With ``values`` M and ``mean`` m
    (heads, head_dim), a head that has gathered u passes on m + M (u - m). Only the outputs of the
    first ``queries`` tokens are read; None: of all.
    """

    scores: Factors
    values: Factors
    mean: torch.Tensor
    queries: int | None = None


def low_rank(site: AttentionSite, attention: Attention, reduction: Reduction) -> LowRankAttention:
    """Cut the low-rank attention of a ``reduction`` out of a dense one."""
    like = attention.qkv.weight
    ranks = Ranks(reduction.scores.ranks, reduction.values.ranks, reduction.queries)
    built = LowRankAttention(site, ranks, bias=attention.qkv.bias is not None)
    tensors = _scores(site, attention, reduction.scores) | _values(site, attention, reduction)
    built.load_state_dict(tensors)
    return built.to(like).requires_grad_(like.requires_grad)


def _scores(site: AttentionSite, attention: Attention, maps: Factors) -> dict[str, torch.Tensor]:
    """Weights that queries and keys are made with."""
    (q, k, _), bias = _in_heads(site, attention)
    tensors = {"q.weight": _joined(maps.left, q), "k.weight": _joined(maps.right, k)}
    if bias is not None:
        tensors["q.bias"] = _joined(maps.left, bias[0])
    return {name: t if name == "k.weight" else t * attention.scale for name, t in tensors.items()}


def _values(
    site: AttentionSite, attention: Attention, reduction: Reduction
) -> dict[str, torch.Tensor]:
    """Weights of values and of the output, whose bias takes up what is constant."""
    (_, _, v), bias = _in_heads(site, attention)
    out = _exact(attention.proj.weight).unflatten(1, (site.heads, site.head_dim)).unbind(1)
    left, right = map(_each_exact, (reduction.values.left, reduction.values.right))
    mean = _exact(reduction.mean)
    own = torch.zeros_like(mean) if bias is None else bias[2]
    constant = [m + a @ (b.T @ (c - m)) for m, a, b, c in zip(mean, left, right, own, strict=True)]
    shift = sum(w @ c for w, c in zip(out, constant, strict=True))
    if attention.proj.bias is not None:
        shift = shift + _exact(attention.proj.bias)
    weight = torch.cat([w @ a for w, a in zip(out, left, strict=True)], dim=1)
    return {"v.weight": _joined(right, v), "proj.weight": weight, "proj.bias": shift}


def _in_heads(
    site: AttentionSite, attention: Attention
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weights (3, heads, head_dim, dim) and biases (3, heads, head_dim) of q, k and v."""
    shape = (3, site.heads, site.head_dim)
    bias = attention.qkv.bias
    return _exact(attention.qkv.weight).unflatten(0, shape), (
        None if bias is None else _exact(bias).view(shape)
    )


def _joined(maps: Sequence[torch.Tensor], heads: torch.Tensor) -> torch.Tensor:
    """What every head's map makes of its weights or biases, one head after the other."""
    return torch.cat([a.T @ w for a, w in zip(_each_exact(maps), heads, strict=True)])


def _each_exact(maps: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [_exact(each) for each in maps]


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().cpu()
