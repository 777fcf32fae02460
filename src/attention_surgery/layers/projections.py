"""q, k and v of a Wan self-attention layer, as diffusers computes them: projections, QK-norm, RoPE."""

from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor, nn

from ..ops.hybrid import Backend, KeySource, log_once
from ..ops.plain import is_plain, keeps_dtype
from ..ops.triton.support import DTYPES, device_lacks

MAX_CHANNELS = 2**13
"""Of a token, that the kernel holds in registers."""

MAX_BATCH = 2**16 - 1
"""Of a grid's second axis."""

RotaryEmb = tuple[Tensor, Tensor]
"""Cosines and sines of RoPE's angles, 1 n 1 d, each value twice."""


def project_qkv(
    attn: WanAttention, hidden_states: Tensor, rotary_emb: RotaryEmb | None, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, KeySource | None]:
    """q, k, v of the self-attention layer `attn` after QK-norm and RoPE, each b n h d, and what k was made of.

    On a GPU one kernel normalizes and rotates q and k, in float32, unless `backend` is "eager" or the kernel lacks what
    is asked for, which the log then names once. Otherwise the layer's modules are called, in the stock order. The
    kernel is differentiable once, and not in forward mode; only for its backward there is a source of k.
    """
    if attn.fused_projections:
        query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)
    else:
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
    heads = (attn.heads, -1)
    value = value.unflatten(2, heads)
    wanted = backend == "triton" or (backend == "auto" and query.is_cuda)
    if wanted and device_lacks(query.device.type, query.device.index) is None:
        reason = kernel_lacks(attn, query, key, value, rotary_emb)
        if reason is not None:
            log_once(reason, "QK-norm with RoPE")
        elif rotary_emb is not None:
            from ..ops.triton import functions  # Triton is optional, and heavy to import

            cos, sin = (table[0, :, 0] for table in rotary_emb)
            norms: tuple[Any, Any] = attn.norm_q, attn.norm_k
            weights, eps = [norm.weight for norm in norms], [norm.eps for norm in norms]
            source = KeySource(key, weights[1], cos, sin, eps[1])
            query, key = functions.Rotated.apply(query, key, *weights, cos, sin, *eps)
            return query, key, value, source if key.requires_grad else None
    query = attn.norm_q(query).unflatten(2, heads)
    key = attn.norm_k(key).unflatten(2, heads)
    if rotary_emb is not None:
        query, key = rotate(query, *rotary_emb), rotate(key, *rotary_emb)
    if query.dtype != value.dtype and torch.is_autocast_enabled(query.device.type):  # norms are float32 there
        query, key = query.type_as(value), key.type_as(value)
    return query, key, value, None


def kernel_lacks(
    attn: WanAttention, query: Tensor, key: Tensor, value: Tensor, rotary_emb: RotaryEmb | None
) -> str | None:
    """Why the kernel cannot normalize and rotate `query` and `key` (b n h·d); None if it can."""
    if rotary_emb is None:
        return "there is no RoPE"
    (b, n, channels), head_dim = query.shape, value.shape[3]
    if key.shape != query.shape:
        return f"k is {tuple(key.shape)}; expected {tuple(query.shape)}, as q"
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return f"q, k and v are {query.dtype}, {key.dtype} and {value.dtype}; expected one of {DTYPES} for all"
    if head_dim % 2 or channels > MAX_CHANNELS or b > MAX_BATCH:
        return f"b n h·d is {tuple(query.shape)}; expected h·d up to {MAX_CHANNELS}, d even and b up to {MAX_BATCH}"
    for name, table in zip(("cos", "sin"), rotary_emb, strict=True):
        if table.shape != (1, n, 1, head_dim) or table.dtype not in DTYPES or table.requires_grad:
            return f"{name} of RoPE is {tuple(table.shape)}, {table.dtype}; expected 1 n 1 d without a gradient"
    for name, norm in {"norm_q": attn.norm_q, "norm_k": attn.norm_k}.items():
        if not is_plain(norm, nn.RMSNorm) or norm.weight is None or norm.eps is None:
            return f"{name} is more than an nn.RMSNorm with a weight and an eps"
        if norm.normalized_shape != (channels,) or not keeps_dtype(norm, query):
            return (
                f"{name} is of shape {norm.normalized_shape} and {norm.weight.dtype}; q has {channels}, {query.dtype}"
            )
    tensors = (query, key, value, *rotary_emb, attn.norm_q.weight, attn.norm_k.weight)
    if not all(type(x) in (Tensor, nn.Parameter) and x.device == query.device for x in tensors):
        return f"q, k, v, RoPE and norms are not all plain tensors on {query.device}"
    return None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding on interleaved pairs: `x` b n h d, `cos` and `sin` 1 n 1 d, each value twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    out = x.new_empty(x.shape)
    out[..., 0::2] = even * cos - odd * sin
    out[..., 1::2] = even * sin + odd * cos
    return out
