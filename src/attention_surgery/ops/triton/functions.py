"""Differentiation: what each part of hybrid attention keeps for the backward, and how gradients are shared out.

`Rotated` is QK-norm and RoPE, `LinearTokens` the key side. `Queries` and `Merged` or `Projected` share out the
gradients of a merge behind a differentiable softmax part. As functions of autograd they refuse forward-mode
differentiation, where differentiable operators would give zeros.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..tokens import take
from . import operators


class Rotated(torch.autograd.Function):
    """`operators.rotary`: q and k (b n h·d) after QK-norm and RoPE, b n h d."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps_q: float,
        eps_k: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.save_for_backward(q, k, weight_q, weight_k, cos, sin)
        ctx.eps = eps_q, eps_k
        return operators.rotary(q, k, weight_q, weight_k, cos, sin, eps_q, eps_k)

    @staticmethod
    def backward(ctx: Any, q_grad: Tensor, k_grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return *operators.rotary_backward(q_grad, k_grad, *ctx.saved_tensors, *ctx.eps), *[None] * 4


class LinearTokens(torch.autograd.Function):
    """S̄ and z̄ of the linear tokens, with the softmax tokens of k and v handed through (unless the rate is 0).

    Their gradients come back here, so that those of k and v are each written once, without zeros or sums between.

    With the source of k, which `Rotated` keeps anyway, k is not kept, but made again. Its softmax tokens are then a
    copy: a view, which the softmax part keeps, would keep all of k.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, table: Tensor | None, rate: int,
        source: Tensor | None, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        ctx.save_for_backward(k if source is None else None, v, w1, b1, w2, b2, table, source, weight, cos, sin)
        ctx.rate, ctx.eps = rate, eps
        state, mass = operators.linear_state(k, v, w1, b1, w2, b2, table, rate)
        if rate == 0:
            return state, mass
        if table is None:
            k_soft = k[:, ::rate] if source is None else k[:, ::rate].clone(memory_format=torch.contiguous_format)
            return state, mass, k_soft, v[:, ::rate]
        return state, mass, take(k, table), take(v, table)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dstate: Tensor, dmass: Tensor, dk_soft: Tensor | None = None, dv_soft: Tensor | None = None
    ) -> tuple[Any, ...]:
        k, v, *phi, table, source, weight, cos, sin = ctx.saved_tensors
        if k is None:
            k = operators.rotary_again(dstate, source, weight, cos, sin, ctx.eps)
        weights = any(ctx.needs_input_grad[2:6])
        dk, dv, *of_map = operators.linear_state_backward(
            dstate, dmass, dk_soft, dv_soft, k, v, *phi, table, ctx.rate, weights
        )  # fmt: skip
        return dk, dv, *(of_map if weights else [None] * 4), *[None] * 7


class Queries(torch.autograd.Function):
    """q, handed through to the softmax part, and two links to `Merged` or `Projected`, which cost no memory.

    By the links the gradients of the merge come back here, at the same time as the softmax part's of q: so q's is
    written once, without a sum between.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, q: Tensor, state: Tensor, mass: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, ratio: float
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(q, state, mass, w1, b1, w2, b2)
        ctx.ratio = ratio
        b, n, h, _ = q.shape
        return q.view_as(q), q.new_zeros(1).expand(q.shape), mass.new_zeros(1).expand(b, h, n)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq_soft: Tensor, scaled: Tensor, delta: Tensor
    ) -> tuple[Any, ...]:
        weights = any(ctx.needs_input_grad[3:7])
        dq, dstate, dmass, *of_map = operators.merge_backward(
            scaled, delta, dq_soft, *ctx.saved_tensors, ctx.ratio, weights
        )
        return dq, dstate, dmass, *(of_map if weights else [None] * 4), None


class Merged(torch.autograd.Function):
    """A merge, which leaves all gradients but that of `o` to `Queries`, and tells it by the links what they need."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, scaled_link: Tensor, delta_link: Tensor, q: Tensor, o: Tensor, state: Tensor, mass: Tensor,
        w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, ratio: float,
    ) -> Tensor:  # fmt: skip
        y, denominator = operators.merge(q, o, state, mass, w1, b1, w2, b2, ratio)
        ctx.save_for_backward(y, denominator)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        scaled, delta = operators.output_gradient(dy, *ctx.saved_tensors)
        return scaled, delta, None, scaled, *[None] * 7


class Projected(torch.autograd.Function):
    """`Merged` and the layer's output projection of it, b n h·d → b n c. The backward merges again.

    The softmax part keeps its output for its own backward; y, as large, would be kept beside it for the projection's.
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, scaled_link: Tensor, delta_link: Tensor, q: Tensor, o: Tensor, state: Tensor, mass: Tensor,
        w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, ratio: float, weight: Tensor, bias: Tensor | None,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(q, o, state, mass, w1, b1, w2, b2, weight)
        ctx.ratio = ratio
        y, _ = operators.merge(q, o, state, mass, w1, b1, w2, b2, ratio)
        return F.linear(y.flatten(2), weight, bias)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *of_merge, weight = ctx.saved_tensors
        y, denominator = operators.merge_again(dout, *of_merge, ctx.ratio)
        of_weight, of_bias = ctx.needs_input_grad[-2:]
        dweight = dout.flatten(0, 1).T @ y.flatten(2).flatten(0, 1) if of_weight else None
        dbias = dout.sum((0, 1)) if of_bias else None
        scaled, delta = operators.output_gradient((dout @ weight).view(y.shape), y, denominator)
        return scaled, delta, None, scaled, *[None] * 7, dweight, dbias
