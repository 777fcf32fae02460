"""Hybrid attention, term by term as the paper writes it. The oracle of every faster path; materialises N×N scores."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..rates import Normalizer, Pattern, Rate
from .tokens import Grid, softmax_count, softmax_token_mask

if TYPE_CHECKING:
    from ..layers.feature_map import FeatureMap


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
    backend: str = "auto",
) -> Tensor:
    """Eq. 5, in the dtype of its inputs. q, k, v: b n h d after QK-norm and RoPE; returns b n h d.

    ŷ_i = (Σ_{T_S} exp(q_i·k_j/√D - c_i) v_j + φ_q(q_i) Σ_{T_L} φ_k(k_j)ᵀ v_j) / (the same without v_j),
    with c_i the row maximum of the scaled logits over T_S ("max") or the log of their mean exponential ("mean").
    Rate 1 is softmax attention; "linear" has no softmax terms. c_i is a constant for the gradient under "max".
    `backend` is there so that the two functions can be exchanged; this one has a single way.
    """
    n, heads = q.shape[1], q.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1])
    if rate == 1:
        return torch.einsum("bhij,bjhd->bihd", logits.softmax(dim=-1), v)

    similarity = torch.einsum("bihf,bjhf->bhij", phi_q(q), phi_k(k))
    if rate != "linear":
        softmax_tokens = softmax_token_mask(n, rate, pattern=pattern, heads=heads, grid=grid).to(q.device)[
            None, :, None
        ]
        masked = logits.masked_fill(~softmax_tokens, -math.inf)
        if normalizer == "max":
            c = masked.amax(dim=-1, keepdim=True).detach()
        else:
            c = masked.logsumexp(dim=-1, keepdim=True) - math.log(softmax_count(n, rate))
        similarity = torch.where(softmax_tokens, torch.exp(masked - c), similarity)

    numerator = torch.einsum("bhij,bjhd->bihd", similarity, v)
    denominator = torch.einsum("bhij->bih", similarity)[..., None]
    return numerator / denominator
