"""Hybrid attention through the operators of this package: the same function as `ops.eager.hybrid_attention`."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ...rates import Normalizer, Pattern, Rate
from .. import eager
from ..plain import is_plain, keeps_dtype
from ..tokens import Grid, softmax_token_index
from . import functions, operators

if TYPE_CHECKING:
    from ...layers.feature_map import FeatureMap
    from ..hybrid import KeySource

NO_SOURCE = (None, None, None, None, 0.0)
"""In place of a source of k: k itself is kept."""


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
    projection: nn.Linear | None = None,
    key_source: "KeySource | None" = None,
) -> Tensor:
    """Eq. 5; b n h d → b n h d. The arguments have passed `support.unsupported`.

    The softmax tokens of "stride" are a strided view of k and v; those of the other patterns are gathered. With
    `projection`, which has passed `merges_again`, the result is projected: b n c. With `key_source` k is made again in
    the backward, if it has a gradient, for which its source is kept anyway; of it "stride" then copies too.
    """
    if rate == 1:
        return eager.softmax_attention(q, k, v, attention_backend)
    n, features, table = q.shape[1], phi_q.features, None
    source = NO_SOURCE
    if key_source is not None and k.requires_grad and torch.is_grad_enabled():
        source = key_source
    if rate == "linear":
        state, mass = functions.LinearTokens.apply(k, v, *_parameters(phi_k), None, 0, *source)
        return operators.merge(q, None, state, mass, *_parameters(phi_q), 1 / features)[0]
    if pattern != "stride":
        table = softmax_token_index(n, rate, pattern=pattern, heads=q.shape[2], grid=grid, device=q.device)
    state, mass, k_soft, v_soft = functions.LinearTokens.apply(k, v, *_parameters(phi_k), table, rate, *source)
    m = k_soft.shape[1]
    if normalizer == "mean":
        of_merge = (state, mass, *_parameters(phi_q), (n - m) / m / features)
        if not (q.requires_grad and torch.is_grad_enabled()):
            o = eager.softmax_attention(q, k_soft, v_soft, attention_backend)
            return operators.merge(q, o, *of_merge)[0]
        q_soft, *links = functions.Queries.apply(q, *of_merge)
        o = eager.softmax_attention(q_soft, k_soft, v_soft, attention_backend)
        if projection is None:
            return functions.Merged.apply(*links, q, o, *of_merge)
        parameters = projection.weight, projection.bias
        parameters = (None if x is None else x.to(q.dtype) for x in parameters)  # as autocast takes them
        return functions.Projected.apply(*links, q, o, *of_merge, *parameters)
    return operators.attend(q, k_soft, v_soft, state, mass, *_parameters(phi_q), (n - m) / features)[0]


def merges_again(q: Tensor, rate: Rate, normalizer: Normalizer, projection: nn.Module) -> bool:
    """Whether the backward computes the input of `projection` again: where it would be kept beside another tensor.

    Not if calling `projection` does more than a product with plain parameters in the dtype of q, autocast's included:
    LoRA, quantized or distributed weights, hooks on it or on all modules, another `forward`.
    """
    if rate in (1, "linear") or normalizer != "mean" or not (q.requires_grad and torch.is_grad_enabled()):
        return False
    return is_plain(projection, nn.Linear) and keeps_dtype(projection, q)


def _parameters(phi: "FeatureMap") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (w1, w2), (b1, b2) = phi.weights, phi.biases
    return w1, b1, w2, b2
