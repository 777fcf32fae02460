# pyright: reportArgumentType=false
"""Launches of the backward kernels. Tensors in, tensors out, no autograd."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .attention_gradients import key_gradient_kernel, query_gradient_kernel
from .descriptors import aligned, dense
from .map_gradients import (
    map_gradient_kernel,
    output_gradient_kernel,
    softmax_tokens_kernel,
    sum_products_kernel,
    token_product_kernel,
    value_gradient_kernel,
)
from .plan import Map, Plan, Rotary, cdiv, linear_count, prepare, specialized_launches, strides, token_set
from .rotary import rotary_gradient_kernel

WORKSPACE_BYTES, WORKSPACE_TENSORS = 2**27, 3.1
"""Work space of the gradients through φ: so many bytes, or so many tensors of tokens if that is more. Heads go through
in rounds that fit it. A larger one sets the peak memory of training; a smaller one has the device wait for launches."""


ROTARY_SHARES = 4
"""Programs of the gradient of QK-norm and rotation, of each q and k, for a multiprocessor."""


class Contraction(NamedTuple):
    """What φ's features are contracted with, in the terms of `map_gradients`. `query` tells the side.

    Query side: g is ŷ, with t (`delta`), S̄, z̄ and r (`scale`), and what else is `added` to dq. Key side: g is v, with
    dS̄, dz̄, 1/n_L, and dv to fill.
    """

    query: bool
    g: Tensor
    state: Tensor
    mass: Tensor
    scale: float
    delta: Tensor | None = None
    added: Tensor | None = None
    dv: Tensor | None = None


def rotary_gradients(q_grad: Tensor, k_grad: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of `forward.rotary`: dq and dk (b n c), and those of the norms' weights, float32."""
    b, n, c = rotary.q.shape
    dq, dk = (torch.empty(b, n, c, dtype=x.dtype, device=x.device) for x in (rotary.q, rotary.k))
    shares = min(b * n, ROTARY_SHARES * Plan(q_grad).processors)
    dweights = torch.empty(shares, 2, c, dtype=torch.float32, device=dq.device)
    rotary_gradient_kernel[shares, 2](
        q_grad=q_grad.contiguous(),
        k_grad=k_grad.contiguous(),
        dq=dq,
        dk=dk,
        dweights=dweights,
        count=b * n,
        **rotary.arguments(),
    )
    return dq, dk, dweights[:, 0].sum(0), dweights[:, 1].sum(0)


def output_gradients(dy: Tensor, y: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    """ŷ = do, and t (b h n), of `forward.merge`."""
    dy, plan = aligned(dy), Plan(y)
    scaled, delta = plan.tokens(), plan.float32(plan.b, plan.h, plan.n)
    cut = plan.blocks("output_gradient")
    output_gradient_kernel[cdiv(plan.n, cut.rows), plan.b * plan.h](
        dy=dy,
        y=y,
        denominator=denominator,
        scaled=scaled,
        delta=delta,
        N=plan.n,
        H=plan.h,
        BM=cut.rows,
        D=plan.d,
        **strides("y", dy),
        **plan.launch(cut),
    )
    return scaled, delta


def merge_gradients(
    scaled: Tensor, delta: Tensor, dq_soft: Tensor | None, q: Tensor, state: Tensor, mass: Tensor, phi: Map,
    ratio: float, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `forward.merge` and the linear part of `forward.attend`: dq, with `dq_soft` added, dS̄, dz̄, and those of φ."""
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    side = Contraction(query=True, g=scaled, state=state, mass=mass, scale=ratio, delta=delta, added=dq_soft)
    return dq, *_map_gradients(q, dq, side, phi, None, 0, weights)


def state_gradients(
    dstate: Tensor, dmass: Tensor, softmax: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor, phi: Map,
    table: Tensor | None, rate: int, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `forward.linear_state`: dk and dv, which take `softmax` at the softmax tokens (b m h d), and those of φ."""
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    if softmax is not None:
        _put_softmax_tokens(dk, dv, *softmax, table, rate)
    side = Contraction(
        query=False, g=v, state=dstate, mass=dmass, scale=1 / linear_count(k.shape[1], rate), dv=dv
    )  # fmt: skip
    return dk, dv, *_map_gradients(k, dk, side, phi, table, rate, weights)[2:]


def _put_softmax_tokens(
    dk: Tensor, dv: Tensor, dk_soft: Tensor, dv_soft: Tensor, table: Tensor | None, rate: int
) -> None:
    plan, count = Plan(dk), dk_soft.shape[1]
    cut = plan.blocks("softmax_tokens")
    dk_soft, dv_soft = aligned(dk_soft), aligned(dv_soft)
    softmax_tokens_kernel[cdiv(count, cut.rows), plan.b * plan.h](
        dk_soft=dk_soft,
        dv_soft=dv_soft,
        dk=dk,
        dv=dv,
        M=count,
        N=plan.n,
        H=plan.h,
        BM=cut.rows,
        D=plan.d,
        **strides("k", dk_soft),
        **strides("v", dv_soft),
        **token_set(table, rate),
        **plan.launch(cut),
    )


def _map_gradients(
    x: Tensor, dx: Tensor, side: Contraction, phi: Map, table: Tensor | None, rate: int, weights: bool
) -> tuple[Tensor, ...]:
    """Fills dx, and dv (key side); returns dS̄ and dz̄ (query side), dw1, db1, dw2, db2 (if `weights`)."""
    x, g, plan = aligned(x), aligned(side.g), Plan(x, phi.degree)
    prepared = prepare(
        phi, plan, scale=0.5 if plan.specialized else 1.0, state=side.state, mass=side.mass, state_scale=side.scale
    )  # fmt: skip
    count, heads = linear_count(plan.n, rate), plan.b * plan.h
    cut, value_cut, product_cut, sum_cut = (
        plan.blocks(kernel) for kernel in ("map_gradient", "value_gradient", "token_product", "sum_products")
    )
    step = specialized_launches().TILE_TOKENS if plan.specialized else max(cut.rows, value_cut.rows, product_cut.rows)
    padded = cdiv(count, step) * step

    width = (4 if weights else 2) * plan.f
    per_head = padded * width * x.element_size()
    rounds = cdiv(heads * per_head, int(max(WORKSPACE_BYTES, WORKSPACE_TENSORS * x.numel() * x.element_size())))
    per_round = cdiv(heads, rounds)
    work = torch.empty(per_round * padded, width, dtype=x.dtype, device=x.device)
    if plan.specialized:
        tiles = side.query + (1 + plan.p) * weights
        shares, steps = specialized_launches().split_products(padded, per_round, tiles, plan)
    else:
        tiles = plan.p * (side.query + (1 + plan.p) * weights)
        shares, steps = plan.shares(padded // product_cut.rows, max(1, tiles * per_round))
    rows = plan.d * side.query + (plan.d + plan.f) * weights
    record = rows + side.query + 2 * weights  # a row of sums for each product
    products = plan.float32(shares, heads, record, plan.f)
    results = [plan.float32(*shape if side.query else (0,)) for shape in (side.state.shape, side.mass.shape)]
    results += [plan.float32(*parameter.shape if weights else (0,)) for parameter in phi]

    # What the rounds share is made once: a launch takes the host about as long as a kernel takes the device.
    shared = {
        "count": count, "padded": padded, "N": plan.n, "H": plan.h, **token_set(table, rate),
    }  # fmt: skip
    of_tokens = {
        "x": x, "g": g, "delta": side.delta, "QUERY": side.query, "WEIGHTS": weights,
        **shared, **strides("x", x), **strides("g", g),
    }  # fmt: skip
    of_products = {"product": products, "record": record * plan.f, "share": heads * record * plan.f}
    for_map = of_tokens | {
        "mass": prepared.mass, "added": None if side.added is None else dense(side.added), "dx": dx,
    }  # fmt: skip
    if plan.specialized:
        for_map |= specialized_launches().map_gradient_arguments(x, g, dx, work, prepared, side.query, padded, plan)
        for_map |= {"dv": side.dv, "RELATIVE": side.added is None if side.query else rate == 0}
    else:
        for_map |= plan.map_options(cut) | {
            "state": plan.matrix_argument(prepared.state, plan.d, plan.d),
            "w1": plan.matrix_argument(prepared.w1, plan.d, cut.hidden),
            "w2": plan.matrix_argument(prepared.w2, cut.hidden, plan.d),
            "b1": prepared.biases[0],
            "b2": prepared.biases[1],
            "work": plan.matrix_argument(work, cut.rows, plan.d),
            "work_hidden": plan.matrix_argument(work, cut.rows, cut.hidden),
            "zero": 0,
        }  # fmt: skip
    for_values = shared | plan.options(value_cut) | {
        "work": plan.matrix_argument(work, value_cut.rows, plan.d),
        "state": plan.matrix_argument(prepared.state, plan.d, plan.d),
        "dv": side.dv,
        "WORK": width,
        "P": plan.p,
    }  # fmt: skip
    for_products = of_tokens | of_products | {"steps": steps, "P": plan.p}
    if plan.specialized:
        for_products |= specialized_launches().product_arguments(x, g, work, plan)
    else:
        for_products |= plan.options(product_cut) | {"work": plan.matrix_argument(work, product_cut.rows, plan.d)}

    for first in range(0, heads, per_round):
        now = min(per_round, heads - first)
        if plan.specialized:
            specialized_launches().map_gradient_kernel(now, plan, first=first, **for_map)
        else:
            map_gradient_kernel[padded // cut.rows, now](first=first, **for_map)
            if not side.query:
                value_gradient_kernel[padded // value_cut.rows, now](first=first, **for_values)
        if tiles and plan.specialized:
            specialized_launches().product_kernel((tiles, shares, now), first=first, **for_products)
        elif tiles:
            token_product_kernel[tiles, shares, now](first=first, **for_products)
    if tiles:
        names = ("dstate", "dmass", "dw1", "db1", "dw2", "db2")
        sum_products_kernel[rows // sum_cut.rows * plan.p, plan.h](
            shares=shares,
            B=plan.b,
            H=plan.h,
            scale=side.scale,
            QUERY=side.query,
            WEIGHTS=weights,
            BM=sum_cut.rows,
            D=plan.d,
            P=plan.p,
            **dict(zip(names, results, strict=True)),
            **of_products,
            **plan.launch(sum_cut),
        )
    return tuple(results)


def attend_gradients(
    q: Tensor, k: Tensor, v: Tensor, scaled: Tensor, delta: Tensor, top: Tensor, linear_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dq (with `linear_grad`, that of the linear part, added), dk and dv of the softmax part of `forward.attend`."""
    q, k, v, plan = aligned(q), aligned(k), aligned(v), Plan(q)
    dq = plan.tokens()
    dk, dv = (torch.empty(k.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    shared = {
        "delta": delta, "top": top, "N": plan.n, "M": k.shape[1], "H": plan.h,
        **strides("q", q), **strides("k", k), **strides("v", v),
        "logit_scale": math.log2(math.e) / math.sqrt(plan.d), "scale": 1 / math.sqrt(plan.d),
    }  # fmt: skip
    cut = plan.blocks("query_gradient")
    query_gradient_kernel[cdiv(plan.n, cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.rows),
        k=plan.token_argument(k, cut.across),
        v=plan.token_argument(v, cut.across),
        grad=plan.token_argument(scaled, cut.rows),
        linear_grad=plan.token_argument(linear_grad, cut.rows),
        dq=plan.token_argument(dq, cut.rows),
        BN=cut.across,
        **shared,
        **plan.options(cut),
    )
    cut = plan.blocks("key_gradient")
    key_gradient_kernel[cdiv(k.shape[1], cut.rows), plan.b * plan.h](
        q=plan.token_argument(q, cut.across),
        k=plan.token_argument(k, cut.rows),
        v=plan.token_argument(v, cut.rows),
        grad=plan.token_argument(scaled, cut.across),
        dk=plan.token_argument(dk, cut.rows),
        dv=plan.token_argument(dv, cut.rows),
        BN=cut.across,
        **shared,
        **plan.options(cut),
    )
    return dq, dk, dv
