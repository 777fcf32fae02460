# pyright: reportArgumentType=false
"""Launches of the backward kernels. Tensors in, tensors out, no autograd."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..tokens import put
from .attention_gradients import key_gradient_kernel, query_gradient_kernel
from .descriptors import aligned
from .map_gradients import (
    map_gradient_kernel,
    output_gradient_kernel,
    token_product_kernel,
    value_gradient_kernel,
)
from .plan import Map, Plan, linear_count, strides, token_set

WORKSPACE_BYTES, WORKSPACE_TENSORS = 2**27, 3.1
"""Work space of the gradients through φ: so many bytes, or so many tensors of tokens if that is more. Heads go through
in rounds that fit it. A larger one sets the peak memory of training; a smaller one has the device wait for launches."""


class Contraction(NamedTuple):
    """What φ's features are contracted with, in the terms of `map_gradients`. `query` tells the side.

    Query side: g is ŷ, with t (`delta`), S̄, z̄ and r (`scale`). Key side: g is v, with dS̄, dz̄, 1/n_L, and dv to fill.
    """

    query: bool
    g: Tensor
    state: Tensor
    mass: Tensor
    scale: float
    delta: Tensor | None = None
    dv: Tensor | None = None


def merge_gradients(
    dy: Tensor, y: Tensor, denominator: Tensor, q: Tensor, state: Tensor, mass: Tensor, phi: Map, ratio: float,
    weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `forward.merge` and the linear part of `forward.attend`: ŷ = do, t (b h n), dq, dS̄, dz̄, and those of φ."""
    dy, plan = aligned(dy), Plan(q)
    scaled, delta, dq = plan.tokens(), plan.float32(plan.b, plan.h, plan.n), plan.tokens()
    cut = plan.blocks("output_gradient")
    output_gradient_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
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
    side = Contraction(query=True, g=scaled, state=state, mass=mass, scale=ratio, delta=delta)
    dstate, dmass, *of_map = _map_gradients(q, dq, side, phi, None, 0, weights)
    return scaled, delta, dq, dstate, dmass, *of_map


def state_gradients(
    dstate: Tensor, dmass: Tensor, softmax: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor, phi: Map,
    table: Tensor | None, rate: int, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `forward.linear_state`: dk and dv, which take `softmax` at the softmax tokens (b m h d), and those of φ."""
    count = linear_count(k.shape[1], rate)
    dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(2))
    for whole, part in zip((dk, dv), softmax or (), strict=False):
        if table is None:
            whole[:, ::rate] = part
        else:
            put(whole, table, part)
    side = Contraction(query=False, g=v, state=dstate, mass=dmass, scale=1 / count, dv=dv)
    _, _, *of_map = _map_gradients(k, dk, side, phi, table, rate, weights)
    return dk, dv, *of_map


def _map_gradients(
    x: Tensor, dx: Tensor, side: Contraction, phi: Map, table: Tensor | None, rate: int, weights: bool
) -> tuple[Tensor, ...]:
    """Fills dx, and dv (key side); returns dS̄ and dz̄ (query side), dw1, db1, dw2, db2 (if `weights`)."""
    x, g, phi, plan = aligned(x), aligned(side.g), phi.like(x), Plan(x, phi.degree)
    count, heads = linear_count(plan.n, rate), plan.b * plan.h
    cut = plan.blocks("map_gradient")
    step = max(plan.blocks(kernel).rows for kernel in ("map_gradient", "value_gradient", "token_product"))
    padded = triton.cdiv(count, step) * step
    state = torch.mul(side.state, side.scale, out=torch.empty(side.state.shape, dtype=x.dtype, device=x.device))
    tokens = token_set(table, rate)

    buffers = ["features"] + ["hidden", "grad_output", "grad_hidden"] * weights
    per_head = len(buffers) * padded * plan.f * x.element_size()
    rounds = triton.cdiv(heads * per_head, int(max(WORKSPACE_BYTES, WORKSPACE_TENSORS * x.numel() * x.element_size())))
    per_round = triton.cdiv(heads, rounds)
    size = (per_round, padded, plan.f)
    work = dict(zip(buffers, torch.empty(len(buffers), *size, dtype=x.dtype, device=x.device), strict=True))
    widths = {"features": plan.d, "hidden": cut.hidden, "grad_output": plan.d, "grad_hidden": cut.hidden}

    # What the rounds share is made once: a launch takes the host about as long as a kernel takes the device.
    shared = {"count": count, "padded": padded, "N": plan.n, "H": plan.h}
    arguments = {
        "x": x,
        "g": g,
        "delta": side.delta,
        "state": plan.matrix_argument(state, plan.d, plan.d),
        "mass": side.mass.contiguous(),
        "w1": plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        "b1": phi.b1,
        "w2": plan.matrix_argument(phi.w2, cut.hidden, plan.d),
        "b2": phi.b2,
        "dx": dx,
        "scale": side.scale,
        "zero": 0,
        **{
            name: plan.matrix_argument(work[name], cut.rows, columns) if name in work else None
            for name, columns in widths.items()
        },
        "QUERY": side.query,
        "WEIGHTS": weights,
        **strides("x", x),
        **strides("g", g),
        **shared,
        **tokens,
        **plan.map_options(cut),
    }
    value_cut = plan.blocks("value_gradient")
    for_values = {
        "features": plan.matrix_argument(work["features"], value_cut.rows, plan.d),
        "state": plan.matrix_argument(state, plan.d, plan.d),
        "dv": side.dv,
        "F": plan.f,
        **shared,
        **tokens,
        **plan.options(value_cut),
    }
    products = {}
    if side.query:
        of_state = plan.float32(heads, plan.d + 1, plan.f)
        all_tokens = shared | token_set(None, 0)
        products["state"] = TokenProduct(plan, g, work["features"], side.delta, of_state, per_round, all_tokens)
    if weights:
        of_w1, of_w2 = (plan.float32(heads, rows + 1, plan.f) for rows in (plan.d, plan.f))
        products["w1"] = TokenProduct(plan, x, work["grad_hidden"], None, of_w1, per_round, shared | tokens)
        products["w2"] = TokenProduct(
            plan, work["hidden"], work["grad_output"], None, of_w2, per_round, shared | tokens
        )  # fmt: skip

    for first in range(0, heads, per_round):
        now = min(per_round, heads - first)
        map_gradient_kernel[padded // cut.rows, now](first=first, **arguments)
        if not side.query:
            value_gradient_kernel[padded // value_cut.rows, now](first=first, **for_values)
        for product in products.values():
            product.add(first, now)

    results = []
    if side.query:
        product, total = products["state"].into.unflatten(0, (plan.b, plan.h)).split((plan.d, 1), dim=2)
        results += [product.transpose(2, 3).contiguous() * side.scale, total.squeeze(2) * -side.scale]
    else:
        results += [plan.float32(0), plan.float32(0)]
    for name in ("w1", "w2"):
        if weights:
            stack = products[name].into
            product, total = stack.unflatten(0, (plan.b, plan.h)).sum(0).split((stack.shape[1] - 1, 1), dim=1)
            results += [product.clone(memory_format=torch.contiguous_format), total.reshape(plan.h, plan.f).clone()]
        else:
            results += [plan.float32(0), plan.float32(0)]
    return tuple(results)


class TokenProduct:
    """leftᵀ right over the tokens, and under it the (weighted) sum of right: heads × (height + 1) × width, float32.

    `left` is a tensor of tokens (b n h d), or in the work space, as `right` is.
    """

    def __init__(
        self, plan: Plan, left: Tensor, right: Tensor, weight: Tensor | None, into: Tensor, heads: int,
        shared: dict[str, object],
    ) -> None:  # fmt: skip
        cut, tokens = plan.blocks("token_product"), left.ndim == 4
        height, width = (into.shape[1] - 1) // plan.d, into.shape[2] // plan.d
        self.into, self.grid = into, height * width
        self.shares, steps = plan.shares(right.shape[1] // cut.rows, self.grid * heads)
        self.partial = plan.float32(self.shares, heads, *into.shape[1:])
        self.arguments = {
            "left": left if tokens else plan.matrix_argument(left, cut.rows, plan.d),
            "right": plan.matrix_argument(right, cut.rows, plan.d),
            "weight": weight,
            "product": self.partial,
            "steps": steps,
            "TOKENS": tokens,
            "WEIGHTED": weight is not None,
            "L": height,
            "R": width,
            **(strides("l", left) if tokens else {"stride_lb": 0, "stride_ln": 0, "stride_lh": 0}),
            **shared,
            **plan.options(cut),
        }

    def add(self, first: int, now: int) -> None:
        """Of `now` heads from `first` on, whose features are in the work space."""
        token_product_kernel[self.grid, self.shares, now](first=first, **self.arguments)
        partial = self.partial.view(-1)[: self.shares * self.into[0].numel() * now].view(-1, now, *self.into.shape[1:])
        torch.sum(partial, dim=0, out=self.into[first : first + now])


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
    query_gradient_kernel[triton.cdiv(plan.n, cut.rows), plan.b * plan.h](
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
    key_gradient_kernel[triton.cdiv(k.shape[1], cut.rows), plan.b * plan.h](
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
