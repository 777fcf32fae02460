# pyright: reportArgumentType=false
"""Launches of the forward kernels. Tensors in, tensors out, no autograd."""

import math

import triton
from torch import Tensor

from .attend import attend_kernel
from .descriptors import aligned, dense
from .merge import merge_kernel
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
        w1=plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        b1=phi.b1,
        w2=plan.matrix_argument(phi.w2, cut.hidden, plan.d),
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
    return state.sum(0), mass.sum(0)


def merge(
    q: Tensor, o: Tensor | None, state: Tensor, mass: Tensor, phi: Map, ratio: float, softmax_mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (m·o + ratio·ψ(q) S̄) / n and n = m + ratio·ψ(q) z̄ (b h n); m is 1 unless given, and 0 without o."""
    q, phi, plan = aligned(q), phi.like(q), Plan(q, phi.degree)
    cut = plan.blocks("merge")
    softmax = q if o is None else aligned(o)
    y, denominator = plan.tokens(), plan.float32(plan.b, plan.h, plan.n)
    merge_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.rows),
        o=plan.token_argument(softmax, cut.rows),
        softmax_mass=softmax_mass,
        state=plan.matrix_argument(dense(state.to(q.dtype)), plan.width, plan.d),
        mass=mass.contiguous(),
        w1=plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        b1=phi.b1,
        w2=plan.matrix_argument(phi.w2, cut.hidden, plan.width),
        b2=phi.b2,
        y=plan.token_argument(y, cut.rows),
        denominator=denominator,
        N=plan.n,
        H=plan.h,
        ratio=ratio,
        **strides("q", q),
        **strides("o", softmax),
        SOFTMAX=o is not None,
        WIDTH=plan.width,
        **plan.map_options(cut),
    )
    return y, denominator


def attend(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention over the softmax tokens k, v (b m h d), its mass after the row maximum, and the maxima (b h n).

    The maxima are those of q·k log2(e)/√D.
    """
    q, k, v, plan = aligned(q), aligned(k), aligned(v), Plan(q)
    cut = plan.blocks("attend")
    o, mass, top = plan.tokens(), plan.float32(plan.b, plan.h, plan.n), plan.float32(plan.b, plan.h, plan.n)
    attend_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.rows),
        k=plan.token_argument(k, cut.across),
        v=plan.token_argument(v, cut.across),
        o=plan.token_argument(o, cut.rows),
        mass=mass,
        top=top,
        N=plan.n,
        M=k.shape[1],
        H=plan.h,
        logit_scale=math.log2(math.e) / math.sqrt(plan.d),
        BN=cut.across,
        **strides("q", q),
        **strides("k", k),
        **strides("v", v),
        **plan.options(cut),
    )
    return o, mass, top
