"""Self-attention whose heads have fewer dimensions, and that only tokens ask that are read."""

import warnings
from dataclasses import dataclass
from typing import Any, Self

import torch
from timm.layers import Attention
from timm.models.mobilevit import MobileVitBlock
from torch import nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from torch.nn.utils import skip_init

from moee_analysis.errors import MoeeError
from moee_analysis.models.capture import is_traced
from moee_analysis.models.macs import count_parameters


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


def plain_attentions(model: nn.Module) -> list[AttentionSite]:
    """Find every plain self-attention (``timm.layers.Attention``), in order, if there are any.

    Those of MobileViT are left out: their tokens are windows, of which an image has several.
    """
    blocks = [m for m in model.modules() if isinstance(m, MobileVitBlock)]
    windowed = {part for block in blocks for part in block.modules()}
    named = model.named_modules()
    return [site_of(name, m) for name, m in named if is_plain(m) and m not in windowed]


def find_attentions(model: nn.Module) -> list[AttentionSite]:
    """Find the plain self-attentions, as :func:`plain_attentions`; refuse a model without any."""
    if sites := plain_attentions(model):
        return sites
    expected = "a model with plain self-attention (timm.layers.Attention)"
    hint = 'leave its attention dense: attention="dense"'
    raise MoeeError(expected, f"none in {type(model).__name__}", hint)


def site_of(name: str, attention: Attention) -> AttentionSite:
    """Describe a dense attention and its place in a model."""
    dim, parameters = attention.proj.out_features, count_parameters(attention)
    return AttentionSite(name, dim, attention.num_heads, attention.head_dim, parameters)


def reduced_attentions(model: nn.Module) -> dict[str, "LowRankAttention"]:
    """Return the attentions of lower rank, or with fewer queries, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LowRankAttention)}


def heads_of(attention: Attention, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Queries (scaled), keys and values of every head, each (images, heads, tokens, head_dim)."""
    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, attention.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
    return q * attention.scale, k, v


def attend_with_keys(
    attention: Attention, x: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a dense attention, and its keys (images, heads, tokens, head_dim)."""
    q, k, v = heads_of(attention, x)
    seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
    return attention.proj(seen.transpose(1, 2).flatten(2)), k


def leading_attention(
    attention: "Attention | LowRankAttention", x: torch.Tensor, sizes: torch.Tensor
) -> torch.Tensor:
    """Attention that the first token pays to each, mean of the heads: (images, tokens).

    ``x`` (images, tokens, dim) is what the attention gets; tokens count ``sizes`` times. Products
    with the keys of all tokens are products of the tokens with the query, taken back to them.
    """
    wanted, keys, bias = _query_and_keys(attention)
    first = linear(x[:, 0], wanted.flatten(0, 1), bias).unflatten(-1, wanted.shape[:2])
    asked = torch.einsum("nhr,hrd->nhd", first, keys)
    scores = asked @ x.mT + sizes.log()[:, None]  # keys have a bias in common
    return scores.softmax(dim=-1).mean(dim=1)


def _query_and_keys(
    attention: "Attention | LowRankAttention",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weights of queries and keys, (heads, rank, dim), scores being their product, and a bias."""
    if isinstance(attention, LowRankAttention):
        of_keys, _, of_queries = attention.kvq.weight.split(attention.sizes)
        bias, heads, scale = attention.bias, attention.site.heads, 1.0
    else:
        of_queries, of_keys, _ = attention.qkv.weight.chunk(3)
        bias = None if attention.qkv.bias is None else attention.qkv.bias.chunk(3)[0]
        heads, scale = attention.num_heads, attention.scale
    wanted, keys = (weight.unflatten(0, (heads, -1)) for weight in (of_queries, of_keys))
    return wanted, scale * keys, bias


def is_plain(module: nn.Module) -> bool:
    """Whether scores are q k^T, outputs A v, and nothing stands in between."""
    if type(module) is not Attention or getattr(module, "gate", None) is not None:
        return False
    between = [getattr(module, name, None) for name in ("q_norm", "k_norm", "norm")]
    plain = all(isinstance(m, nn.Identity | None) for m in between)
    return plain and module.qkv.in_features == module.proj.out_features


@dataclass(frozen=True)
class Ranks:
    """Dimensions that every head has for ``scores`` of tokens, and for ``values`` it passes on."""

    scores: int
    values: int
    queries: int | None = None  # how many tokens, the first ones, are asked for; None: all


class LowRankAttention(nn.Module):
    """Self-attention with few dimensions in its heads, in the place of the dense one at ``site``.

    The outputs of tokens beyond the first ``queries`` are zeros. Queries may have a ``bias``;
    softmax takes away that of keys, and that of values goes into the output's.
    """

    def __init__(self, site: AttentionSite, ranks: Ranks, *, bias: bool) -> None:
        super().__init__()
        self.site, self.ranks = site, ranks
        scores, values = site.heads * ranks.scores, site.heads * ranks.values
        self.sizes = [scores, values, scores]
        self.kvq = _unfilled(site.dim, sum(self.sizes), bias=False)
        self.register_parameter("bias", nn.Parameter(torch.empty(scores)) if bias else None)
        self.proj = _unfilled(values, site.dim, bias=True)

    def forward(
        self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, **others: Any
    ) -> torch.Tensor:
        """Map tokens (images, tokens, dim) to the same shape; ``attn_mask`` joins the scores."""
        if any(others.values()):
            raise MoeeError("attention to all tokens", "is_causal", "leave the attention dense")
        whole = self.ranks.queries is None
        seen = self._for_all(x, attn_mask) if whole else self._for_some(x, attn_mask)
        out = self.proj(seen.transpose(1, 2).flatten(2))
        return out if whole else pad(out, (0, 0, 0, x.shape[1] - out.shape[1]))

    def _for_all(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of all tokens, (images, heads, tokens, values)."""
        bias = None if self.bias is None else pad(self.bias, (sum(self.sizes[:2]), 0))
        kvq = linear(x, self.kvq.weight, bias)
        # the fast kernel of CPUs takes only queries, keys and values of one width
        fast = x.device.type == "cpu" and (is_traced() or torch.backends.cuda.flash_sdp_enabled())
        if fast and 0 < self.ranks.scores != self.ranks.values > 0:
            return self._of_one_width(kvq, mask)
        k, v, q = map(self._in_heads, kvq.split(self.sizes, dim=-1))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    def _for_some(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention of the tokens whose output is read, (images, heads, queries, values)."""
        of_all, of_read = self.kvq.weight.split([sum(self.sizes[:2]), self.sizes[2]])
        k, v = map(self._in_heads, linear(x, of_all).split(self.sizes[:2], dim=-1))
        q = self._in_heads(linear(x[:, : self.ranks.queries], of_read, self.bias))
        return scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)

    def _of_one_width(self, kvq: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attention with the narrower ones of keys and values as wide as the others."""
        # They are windows, without a copy, whose ends lie in the next head or the next of k, v and
        # q: zeros at the ends of queries meet those of keys, and those of values are not passed on.
        scores, values = self.ranks.scores, self.ranks.values
        k, v, q = map(self._in_heads, kvq.split(self.sizes, dim=-1))
        if scores < values:
            k, q = self._windows(kvq, scores, values), pad(q, (0, values - scores))
        else:
            v = self._windows(kvq[..., self.sizes[0] :], values, scores)
        seen = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)
        return seen[..., :values]

    def _windows(self, kvq: torch.Tensor, step: int, width: int) -> torch.Tensor:
        """Start with every head, ``step`` from one to the next: (images, heads, tokens, width)."""
        reached = (self.site.heads - 1) * step + width
        return kvq[..., :reached].unfold(-1, width, step).transpose(1, 2)

    def _in_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Take the heads apart: (images, tokens, heads * rank) to (images, heads, tokens, rank)."""
        heads = self.site.heads
        return x.unflatten(-1, (heads, x.shape[-1] // heads)).transpose(1, 2)


def _unfilled(inputs: int, outputs: int, *, bias: bool) -> nn.Linear:
    with warnings.catch_warnings():
        # torch warns that a layer of no inputs has no initial values to draw
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")
        return skip_init(nn.Linear, inputs, outputs, bias=bias)


@dataclass(frozen=True)
class Factors:
    """Low-rank maps left right^T in the place of identities, each (heads, head_dim, rank)."""

    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def whole(cls, site: AttentionSite) -> Self:
        """The identities themselves."""
        each = torch.eye(site.head_dim, dtype=torch.float64).expand(site.heads, -1, -1)
        return cls(each, each)


@dataclass(frozen=True)
class Reduction:
    """What a low-rank attention does otherwise than the dense one; ``queries`` as in ``Ranks``.

    With ``scores`` M, those of a query q and a key k are q M k^T. With ``values`` M and ``mean`` m
    (heads, head_dim), a head that has gathered u passes on m + M (u - m).
    """

    scores: Factors
    values: Factors
    mean: torch.Tensor
    queries: int | None = None


def low_rank(site: AttentionSite, attention: Attention, reduction: Reduction) -> LowRankAttention:
    """Cut the low-rank attention of a ``reduction`` out of a dense one."""
    shape = (3, site.heads, site.head_dim)
    q, k, v = _exact(attention.qkv.weight).unflatten(0, shape)
    scores, values, mean = reduction.scores, reduction.values, _exact(reduction.mean)
    left, right = _exact(values.left), _exact(values.right)
    asked = attention.scale * _exact(scores.left).mT
    kvq = [_exact(scores.right).mT @ k, right.mT @ v, asked @ q]
    out = _exact(attention.proj.weight).unflatten(1, shape[1:]).transpose(0, 1)
    tensors = {
        "kvq.weight": torch.cat([each.flatten(0, 1) for each in kvq]),
        "proj.weight": torch.cat([*(out @ left)], dim=1),
    }
    bias = torch.zeros(shape[1:], dtype=torch.float64)  # of values
    if attention.qkv.bias is not None:
        of_queries, _, bias = _exact(attention.qkv.bias).view(shape)
        tensors["bias"] = (asked @ of_queries[..., None]).flatten()
    # The output's bias takes up what is constant, the bias of values with it.
    constant = left @ (right.mT @ (bias - mean)[..., None])
    tensors["proj.bias"] = (out @ (mean[..., None] + constant)).sum(dim=0)[:, 0]
    if attention.proj.bias is not None:
        tensors["proj.bias"] += _exact(attention.proj.bias)
    ranks = Ranks(scores.left.shape[-1], left.shape[-1], reduction.queries)
    built = LowRankAttention(site, ranks, bias=attention.qkv.bias is not None)
    built.load_state_dict(tensors)
    like = attention.qkv.weight
    return built.to(like).requires_grad_(like.requires_grad)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().cpu()
