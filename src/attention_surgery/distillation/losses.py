"""The two distillation objectives (Eqs. 6 and 7) and the error that rates are chosen by."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers.feature_map import FeatureMap
from ..ops.tokens import Grid, softmax_token_mask
from ..rates import Normalizer, Pattern, Rate


def value_loss(y: Tensor, y_hat: Tensor) -> Tensor:
    """Eq. 7: the mean of |y - ŷ|, in float32; y, ŷ: b n h d."""
    return F.l1_loss(y_hat.float(), y.float())


def relative_error(y: Tensor, y_hat: Tensor) -> Tensor:
    """e = ‖y - ŷ‖₁ / ‖y‖₁ over all elements; y, ŷ: b n h d. Softmax attention itself has 0."""
    return (y_hat.float() - y.float()).abs().sum() / y.float().abs().sum()


def attention_loss(
    q: Tensor,
    k: Tensor,
    phi_q: FeatureMap,
    phi_k: FeatureMap,
    *,
    rate: Rate,
    normalizer: Normalizer,
    pattern: Pattern,
    grid: Grid | None,
    rows: Tensor,
) -> Tensor:
    """Eq. 6 on some query rows: the mean over (i, j in T_L) of log(1 + (exp(q_i·k_j/√D - c_i) - φ_q(q_i)·φ_k(k_j))²).

    c_i is the normalizer's, over the softmax tokens (over all tokens for "linear"), and holds no gradient. A logit far
    above the softmax tokens' maximum is capped so that its exponential stays finite.

    Args:
        q, k: b n h d.
        rows: int64 positions of the query rows; memory is b · h · len(rows) · n.
    """
    n, heads = k.shape[1], k.shape[2]
    logits = torch.einsum("bihd,bjhd->bhij", q[:, rows].float(), k.float()) / math.sqrt(q.shape[-1])
    softmax_tokens = softmax_token_mask(n, rate, pattern=pattern, heads=heads, grid=grid).to(q.device)[None, :, None]
    reference = logits if rate == "linear" else logits.masked_fill(~softmax_tokens, -math.inf)
    if normalizer == "max":
        c = reference.amax(dim=-1, keepdim=True)
    else:
        count = n if rate == "linear" else -(-n // rate)
        c = reference.logsumexp(dim=-1, keepdim=True) - math.log(count)
    target = torch.exp((logits - c).clamp(max=30.0))
    estimate = torch.einsum("bihf,bjhf->bhij", phi_q(q[:, rows]).float(), phi_k(k).float())
    losses = torch.log1p((target - estimate).square())
    linear_tokens = (~softmax_tokens).expand_as(losses)
    return losses[linear_tokens].mean() if linear_tokens.any() else losses.sum() * 0.0
