# pyright: reportArgumentType=false
"""Launches of the forward kernels. Tensors in, tensors out, no autograd."""

import math

import torch
from torch import Tensor

from .attend import attend_kernel
from .descriptors import aligned
from .merge import merge_kernel
from .plan import Map, Plan, Rotary, cdiv, linear_count, prepare, specialized_launches, strides, token_set
from .rotary import rotary_kernel
from .state import state_kernel, sum_states_kernel

SUM_BLOCK = 1024
"""Numbers of S̄ and z̄ that a program sums up over the shares."""


def rotary(rotary: Rotary) -> tuple[Tensor, Tensor]:
    """q and k after QK-norm and rotary position embedding, b n h d."""
    q, k = rotary.q, rotary.k
    b, n, c = q.shape
    size = b, n, c // rotary.head_dim, rotary.head_dim
    q_out, k_out = (torch.empty(size, dtype=x.dtype, device=x.device) for x in (q, k))
    rotary_kernel[n, b](q_out=q_out, k_out=k_out, **rotary.arguments())
    return q_out, k_out


def rotary_of_k(k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """k as `rotary` makes it, b n h d, without q."""
    b, n, c = k.shape
    out = torch.empty(b, n, c // cos.shape[1], cos.shape[1], dtype=k.dtype, device=k.device)
    arguments = Rotary(k, k, weight, weight, cos, sin, eps, eps).arguments()
    rotary_kernel[n, b](**arguments | {"q": None, "weight_q": None}, q_out=None, k_out=out)
    return out


def linear_state(k: Tensor, v: Tensor, phi: Map, table: Tensor | None, rate: int) -> tuple[Tensor, Tensor]:
    """Means over the linear tokens of ψ(k)ᵀ v (b h f d) and ψ(k) (b h f), float32; ψ = (P·D)^½ φ.

    Shares of the tokens are summed in float32 by one program each, then over the shares in a fixed order.
    """
    k, v, plan = aligned(k), aligned(v), Plan(k, phi.degree)
    count, heads = linear_count(plan.n, rate), plan.b * plan.h
    shared = {"count": count, "H": plan.h, **token_set(table, rate)}
    if plan.specialized:
        states = specialized_launches().linear_state(k, v, phi, plan, shared)
    else:
        prepared, cut = prepare(phi, plan, scale=1.0), plan.blocks("state")
        shares, tiles = plan.shares(cdiv(count, cut.rows), plan.p * heads)
        states = plan.states(shares)
        state_kernel[shares * plan.p, heads](
            k=k,
            v=v,
            w1=plan.matrix_argument(prepared.w1, plan.d, cut.hidden),
            w2=plan.matrix_argument(prepared.w2, cut.hidden, plan.d),
            b1=prepared.biases[0],
            b2=prepared.biases[1],
            state=states,
            tiles=tiles,
            zero=0,
            RESIDENT=cut.resident,
            **strides("k", k),
            **strides("v", v),
            **shared | plan.map_options(cut),
        )
    state, mass = plan.float32(plan.b, plan.h, plan.f, plan.d), plan.float32(plan.b, plan.h, plan.f)
    sum_states_kernel[cdiv(states.shape[2], SUM_BLOCK), heads](
        states=states,
        state=state,
        mass=mass,
        shares=states.shape[0],
        heads=heads,
        BLOCK=SUM_BLOCK,
        D=plan.d,
        P=plan.p,
    )
    return state, mass


def merge(
    q: Tensor, o: Tensor | None, state: Tensor, mass: Tensor, phi: Map, ratio: float, softmax_mass: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = (m·o + ratio·ψ(q) S̄) / n and n = m + ratio·ψ(q) z̄ (b h n); m is 1 unless given, and 0 without o."""
    q, plan = aligned(q), Plan(q, phi.degree)
    softmax = q if o is None else aligned(o.to(q.dtype))  # another under autocast, if q is not of its dtype
    y, denominator = plan.tokens(), plan.float32(plan.b, plan.h, plan.n)
    shared = {
        "softmax_mass": softmax_mass, "mass": mass.contiguous(), "denominator": denominator,
        "N": plan.n, "H": plan.h, "ratio": ratio, "SOFTMAX": o is not None,
    }  # fmt: skip
    if plan.specialized:
        specialized_launches().merge(q, softmax, state, y, phi, plan, shared)
        return y, denominator
    prepared, cut = prepare(phi, plan, scale=1.0, state=state), plan.blocks("merge")
    merge_kernel[cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.rows),
        o=plan.token_argument(softmax, cut.rows),
        state=plan.matrix_argument(prepared.state, plan.width, plan.d),
        w1=plan.matrix_argument(prepared.w1, plan.d, cut.hidden),
        w2=plan.matrix_argument(prepared.w2, cut.hidden, plan.width),
        b1=prepared.biases[0],
        b2=prepared.biases[1],
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
    attend_kernel[cdiv(plan.n, cut.rows), plan.b * plan.h](
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
