"""Hybrid attention in plain PyTorch, with no N×N tensor forward or backward. Runs on every device and dtype."""

import math
from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..rates import Normalizer, Pattern, Rate
from .tokens import Grid, split_tokens

if TYPE_CHECKING:
    from ..layers.feature_map import FeatureMap

TILE_ELEMENTS = 2**24
"""Scores held at once by the "max" path: 64 MiB in float32."""


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: "FeatureMap",
    phi_k: "FeatureMap",
    *,
    rate: Rate,
    normalizer: Normalizer = "max",
    pattern: Pattern = "stride",
    grid: Grid | None = None,
    attention_backend: str | None = None,
) -> Tensor:
    """`ops.naive.hybrid_attention` in linear memory; b n h d → b n h d.

    The softmax part of rate 1 and of normalizer "mean" is one call of diffusers' attention dispatcher with
    `attention_backend` (None: the active one), on N queries and ceil(N/R) keys.
    """
    if rate == 1:
        return softmax_attention(q, k, v, attention_backend)
    if rate == "linear":
        state, mass = linear_state(phi_k(k), v)
        features = phi_q(q)
        return merge(None, features, state, mass, 1.0)
    (k_soft, v_soft), (k_lin, v_lin) = split_tokens(rate, pattern, grid, k, v)
    state, mass = linear_state(phi_k(k_lin), v_lin)
    if normalizer == "mean":
        o = softmax_attention(q, k_soft, v_soft, attention_backend)
        return merge(o, phi_q(q), state, mass, k_lin.shape[1] / k_soft.shape[1])
    return _max_normalized(q, k_soft, v_soft, phi_q(q), state, mass, k_lin.shape[1])


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, attention_backend: str | None = None) -> Tensor:
    """softmax(q kᵀ/√D) v through diffusers' dispatcher; q: b n h d, k and v: b m h d."""
    return dispatch_attention_fn(q, k, v, backend=attention_backend)  # type: ignore[arg-type]


def linear_state(features: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The *mean* over the linear tokens of φ_kᵀ v (b h f d) and of φ_k (b h f): S and z of Eq. 5 over |T_L|.

    A mean stays in the range of half precision where the sum over tens of thousands of tokens would not.
    """
    count = max(features.shape[1], 1)
    state = torch.einsum("bnhf,bnhd->bhfd", features, v / count)
    return state, features.sum(dim=1, dtype=torch.promote_types(features.dtype, torch.float32)) / count


def merge(o: Tensor | None, features: Tensor, state: Tensor, mass: Tensor, ratio: float) -> Tensor:
    """(o + ratio·φ_q S̄) / (1 + ratio·φ_q z̄) with ratio = |T_L|/|T_S|; without `o` (linear attention) φ_q S̄ / φ_q z̄."""
    wide = mass.dtype
    linear = torch.einsum("bnhf,bhfd->bnhd", features, state).to(wide)
    weight = torch.einsum("bnhf,bhf->bnh", features.to(wide), mass)[..., None]
    if o is None:
        return (linear / weight).to(features.dtype)
    return (torch.add(o.to(wide), linear, alpha=ratio) / (1 + ratio * weight)).to(o.dtype)


def _max_normalized(
    q: Tensor, k: Tensor, v: Tensor, features: Tensor, state: Tensor, mass: Tensor, linear_count: int
) -> Tensor:
    """Eq. 5 with the row maximum, tile by tile over the queries; each tile's scores are recomputed in the backward."""
    b, n, h, _ = q.shape
    rows = max(1, min(n, TILE_ELEMENTS // (b * h * k.shape[1])))
    tiles = [
        checkpoint(_max_tile, *tile, k, v, state, mass, linear_count, use_reentrant=False)
        if torch.is_grad_enabled()
        else _max_tile(*tile, k, v, state, mass, linear_count)
        for tile in zip(q.split(rows, dim=1), features.split(rows, dim=1), strict=True)
    ]
    return torch.cat(tiles, dim=1) if len(tiles) > 1 else tiles[0]


def _max_tile(
    q: Tensor, features: Tensor, k: Tensor, v: Tensor, state: Tensor, mass: Tensor, linear_count: int
) -> Tensor:
    wide = mass.dtype
    logits = torch.einsum("bihd,bjhd->bhij", q, k).to(wide) / math.sqrt(q.shape[-1])
    weights = torch.exp(logits - logits.amax(dim=-1, keepdim=True).detach())
    o = torch.einsum("bhij,bjhd->bihd", weights.to(v.dtype), v).to(wide)
    linear = torch.einsum("bnhf,bhfd->bnhd", features, state).to(wide)
    weight = torch.einsum("bnhf,bhf->bnh", features.to(wide), mass)
    mass_softmax = weights.sum(dim=-1).transpose(1, 2)
    return ((o + linear_count * linear) / (mass_softmax + linear_count * weight)[..., None]).to(q.dtype)
