"""q, k and v of a Wan self-attention layer, as diffusers computes them: projections, QK-norm, RoPE."""

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from ..ops.hybrid import Backend
from ..ops.plain import is_plain, keeps_dtype
from ..ops.triton.support import DTYPES, device_lacks

MAX_CHANNELS = 2**13
"""Of a token, that the kernel holds in registers."""

Rotary = tuple[Tensor, Tensor]
"""Cosines and sines of RoPE's angles, 1 n 1 d, each value twice."""


def project_qkv(
    attn: WanAttention, hidden_states: Tensor, rotary_emb: Rotary | None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of the self-attention layer `attn` after QK-norm and RoPE, each b n h d.

    On a GPU one kernel normalizes and rotates q and k, in float32, unless `backend` is "eager" or a norm is more than a
    plain `nn.RMSNorm`. Otherwise the layer's modules are called, in the stock order.
    """
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    heads = (attn.heads, -1)
    value = value.unflatten(2, heads)
    wanted = backend == "triton" or (backend == "auto" and query.is_cuda)
    if wanted and rotary_emb is not None and takes_kernel(attn, query, key, rotary_emb):
        from ..ops.triton import operators  # Triton is optional, and heavy to import

        cos, sin = (table[0, :, 0] for table in rotary_emb)
        weights = attn.norm_q.weight, attn.norm_k.weight
        query, key = operators.rotary(query, key, *weights, cos, sin, _eps(attn.norm_q, query), _eps(attn.norm_k, key))
        return query, key, value
    query = attn.norm_q(query).unflatten(2, heads)
    key = attn.norm_k(key).unflatten(2, heads)
    if rotary_emb is not None:
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
    if query.dtype != value.dtype and torch.is_autocast_enabled(query.device.type):  # norms are float32 there
        query, key = query.type_as(value), key.type_as(value)
    return query, key, value


def takes_kernel(attn: WanAttention, query: Tensor, key: Tensor, rotary_emb: Rotary) -> bool:
    """Whether QK-norm and rotation of `query` and `key` (b n h·d) can be the kernel's."""
    (b, n, channels), (cos, sin) = query.shape, rotary_emb
    head_dim = channels // attn.heads
    if device_lacks(query.device.type, query.device.index) is not None:
        return False
    if not all(type(x) is Tensor and x.dtype in DTYPES and x.device == query.device for x in (query, key, cos, sin)):
        return False
    if key.shape != query.shape or key.dtype != query.dtype or head_dim % 2 or channels > MAX_CHANNELS:
        return False
    if any(x.shape != (1, n, 1, head_dim) or x.requires_grad for x in (cos, sin)) or b > 2**16 - 1:
        return False
    norms = (attn.norm_q, attn.norm_k)
    return all(
        is_plain(norm, nn.RMSNorm)
        and norm.weight is not None
        and norm.normalized_shape == (channels,)
        and keeps_dtype(norm, query)
        for norm in norms
    )


def _eps(norm: nn.RMSNorm, x: Tensor) -> float:
    return torch.finfo(x.dtype).eps if norm.eps is None else norm.eps


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on interleaved pairs."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out
