# pyright: reportArgumentType=false
"""Launches of the forward kernels. Tensors in, tensors out, no autograd."""

import math

import triton
from torch import Tensor

from .descriptors import aligned, dense, matrix_descriptor, token_descriptor
from .merge import attend_kernel, merge_kernel
from .plan import Map, Plan, linear_count, strides, token_set
from .state import state_kernel


def linear_state(k: Tensor, v: Tensor, phi: Map, table: Tensor | None, rate: int) -> tuple[Tensor, Tensor]:
    """Means over the linear tokens of ψ(k)ᵀ v (b h f d) and ψ(k) (b h f), float32; ψ = (P·D)^½ φ.

    Shares of the tokens are summed in float32 by one program each, then over the shares in a fixed order.
    """
    k, v, phi, plan = aligned(k), aligned(v), phi.like(k), Plan(k, phi.degree)
    cut, count = plan.blocks("state"), linear_count(plan.n, rate)
    shares, tiles = plan.shares(triton.cdiv(count, cut.rows), plan.p * plan.b * plan.h)
    state = plan.float32(shares, plan.b, plan.h, plan.f, plan.d)
    mass = plan.float32(shares, plan.b, plan.h, plan.f)
    state_kernel[shares * plan.p, plan.b * plan.h](
        k=k,
        v=v,
        w1=matrix_descriptor(phi.w1, plan.d, cut.hidden),
        b1=phi.b1,
        w2=matrix_descriptor(phi.w2, cut.hidden, plan.d),
        b2=phi.b2,
        state=state,
        mass=mass,
        count=count,
        H=plan.h,
        tiles=tiles,
        zero=0,
        RESIDENT=cut.resident,
        **strides("k", k),
        **strides("v", v),
        **token_set(table, rate),
        **plan.map_options(cut),
    )
    return state.sum(0) / count, mass.sum(0) / count


def merge(q: Tensor, o: Tensor | None, state: Tensor, mass: Tensor, phi: Map, ratio: float) -> tuple[Tensor, Tensor]:
    """y = (o + ratio·ψ(q) S̄) / n and n = 1 + ratio·ψ(q) z̄ (b h n); without o, neither o nor the 1."""
    q, phi, plan = aligned(q), phi.like(q), Plan(q, phi.degree)
    cut = plan.blocks("merge")
    softmax = q if o is None else aligned(o)
    y, denominator = plan.tokens(), plan.float32(plan.b, plan.h, plan.n)
    merge_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=token_descriptor(q, cut.rows),
        o=token_descriptor(softmax, cut.rows),
        state=matrix_descriptor(dense(state.to(q.dtype)), plan.d, plan.d),
        mass=mass.contiguous(),
        w1=matrix_descriptor(phi.w1, plan.d, cut.hidden),
        b1=phi.b1,
        w2=matrix_descriptor(phi.w2, cut.hidden, plan.d),
        b2=phi.b2,
        y=token_descriptor(y, cut.rows),
        denominator=denominator,
        N=plan.n,
        H=plan.h,
        stride_qh=q.stride(2),
        stride_oh=softmax.stride(2),
        ratio=ratio,
        SOFTMAX=o is not None,
        **plan.map_options(cut),
    )
    return y, denominator


def attend(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, mass: Tensor, phi: Map, ratio: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 5 with the row maximum over the softmax tokens k, v (b m h d): y, its denominator, and the maxima (b h n).

    The maxima are those of q·k log2(e)/√D.
    """
    q, k, v, phi, plan = aligned(q), aligned(k), aligned(v), phi.like(q), Plan(q, phi.degree)
    cut = plan.blocks("attend")
    y, denominator, top = plan.tokens(), plan.float32(plan.b, plan.h, plan.n), plan.float32(plan.b, plan.h, plan.n)
    attend_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=token_descriptor(q, cut.rows),
        k=token_descriptor(k, cut.across),
        v=token_descriptor(v, cut.across),
        state=matrix_descriptor(dense(state.to(q.dtype)), plan.d, plan.d),
        mass=mass.contiguous(),
        w1=matrix_descriptor(phi.w1, plan.d, cut.hidden),
        b1=phi.b1,
        w2=matrix_descriptor(phi.w2, cut.hidden, plan.d),
        b2=phi.b2,
        y=token_descriptor(y, cut.rows),
        denominator=denominator,
        top=top,
        N=plan.n,
        M=k.shape[1],
        H=plan.h,
        stride_qh=q.stride(2),
        stride_kh=k.stride(2),
        stride_vh=v.stride(2),
        logit_scale=math.log2(math.e) / math.sqrt(plan.d),
        ratio=ratio,
        BN=cut.across,
        **plan.map_options(cut),
    )
    return y, denominator, top
