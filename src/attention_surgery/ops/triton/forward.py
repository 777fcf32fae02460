# pyright: reportArgumentType=false
"""Launches of the forward kernels. Tensors in, tensors out, no autograd."""

import math

import triton
from torch import Tensor

from .attend import attend_kernel
from .descriptors import aligned, dense
from .hopper import parts
from .hopper.merge import specialized_merge_kernel
from .hopper.state import PARTIAL_MASSES, specialized_state_kernel, split_units
from .merge import merge_kernel
from .plan import Map, Plan, linear_count, strides, token_set
from .state import state_kernel


def linear_state(k: Tensor, v: Tensor, phi: Map, table: Tensor | None, rate: int) -> tuple[Tensor, Tensor]:
    """Means over the linear tokens of ψ(k)ᵀ v (b h f d) and ψ(k) (b h f), float32; ψ = (P·D)^½ φ.

    Shares of the tokens are summed in float32 by one program each, then over the shares in a fixed order.
    """
    k, v, phi, plan = aligned(k), aligned(v), phi.like(k), Plan(k, phi.degree)
    count, heads = linear_count(plan.n, rate), plan.b * plan.h
    shared = {
        "k": k, "v": v, "b1": phi.b1, "b2": phi.b2, "count": count, "H": plan.h, "D": plan.d, "P": plan.p,
        **token_set(table, rate),
    }  # fmt: skip
    if plan.specialized:
        units, programs, shares = split_units(count, heads, plan.p, plan.processors)
        state = plan.float32(shares, plan.b, plan.h, plan.f, plan.d)
        mass = plan.float32(PARTIAL_MASSES * shares, plan.b, plan.h, plan.f)
        of_rows = strides("k", k) | strides("v", v)
        specialized_state_kernel[(programs * plan.p,)](
            w1=parts.matrix_descriptor(phi.w1, plan.d, 64),
            w2=parts.matrix_descriptor(phi.w2, 64, plan.d),
            state=state,
            mass=mass,
            heads=heads,
            units=units,
            shares=shares,
            **parts.LAUNCH,
            **{name: stride // 8 for name, stride in of_rows.items()},
            **shared,
        )
        return state.sum(0), mass.sum(0)
    cut = plan.blocks("state")
    shares, tiles = plan.shares(triton.cdiv(count, cut.rows), plan.p * heads)
    state = plan.float32(shares, plan.b, plan.h, plan.f, plan.d)
    mass = plan.float32(shares, plan.b, plan.h, plan.f)
    state_kernel[shares * plan.p, heads](
        w1=plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        w2=plan.matrix_argument(phi.w2, cut.hidden, plan.d),
        state=state,
        mass=mass,
        tiles=tiles,
        zero=0,
        RESIDENT=cut.resident,
        **strides("k", k),
        **strides("v", v),
        **shared | plan.map_options(cut),
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
    state = dense(state.to(q.dtype))
    shared = {
        "softmax_mass": softmax_mass, "mass": mass.contiguous(), "b1": phi.b1, "b2": phi.b2, "denominator": denominator,
        "N": plan.n, "H": plan.h, "ratio": ratio, "SOFTMAX": o is not None,
    }  # fmt: skip
    if plan.specialized:
        tiles = triton.cdiv(plan.n, 2 * parts.GROUP_TOKENS)
        total = tiles * plan.b * plan.h
        specialized_merge_kernel[(min(plan.processors, total),)](
            q=parts.token_descriptor(q),
            o=parts.token_descriptor(softmax),
            y=parts.token_descriptor(y),
            w1=parts.matrix_descriptor(phi.w1, plan.d, 64),
            w2=parts.matrix_descriptor(phi.w2, 64, plan.f),
            state=parts.matrix_descriptor(state, plan.d, plan.d),
            tiles=tiles,
            total=total,
            stride_qh=q.stride(2),
            stride_oh=softmax.stride(2),
            D=plan.d,
            F=plan.f,
            **parts.LAUNCH,
            **shared,
        )
        return y, denominator
    merge_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.rows),
        o=plan.token_argument(softmax, cut.rows),
        state=plan.matrix_argument(state, plan.width, plan.d),
        w1=plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        w2=plan.matrix_argument(phi.w2, cut.hidden, plan.width),
        y=plan.token_argument(y, cut.rows),
        **strides("q", q),
        **strides("o", softmax),
        **shared,
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
