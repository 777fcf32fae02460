# pyright: reportArgumentType=false
"""Launches of the backward kernels. Tensors in, tensors out, no autograd."""

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..tokens import put
from .attention_gradients import key_gradient_kernel, query_gradient_kernel
from .descriptors import aligned, dense
from .map_gradients import feature_gradient_kernel, input_gradient_kernel, token_product_kernel
from .plan import Map, Plan, linear_count, strides, token_set

WORKSPACE_BYTES, WORKSPACE_TENSORS = 2**27, 1.5
"""Work space of the gradients through φ: so many bytes, or so many tensors of tokens if that is more. Heads go through
in rounds that fit it. A larger one sets the peak memory of training; a smaller one has the device wait for launches."""


class Contraction(NamedTuple):
    """What φ's features are contracted with, and the results of the gradient kernels. `query` tells the side.

    Query side: `other` is dy, `state` and `mass` S̄ and z̄; y, denominator and ratio as in `forward.merge`; results ŷ
    (`scaled`) and t (`delta`). Key side: `other` is v, `state` and `mass` dS̄/n_L and dz̄/n_L; result dv (`scaled`).
    """

    query: bool
    other: Tensor
    state: Tensor
    mass: Tensor
    scaled: Tensor
    y: Tensor | None = None
    denominator: Tensor | None = None
    delta: Tensor | None = None
    ratio: float = 1.0


def merge_gradients(
    dy: Tensor, y: Tensor, denominator: Tensor, q: Tensor, state: Tensor, mass: Tensor, phi: Map, ratio: float,
    weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Of `forward.merge` and the linear part of `forward.attend`: ŷ = do, t (b h n), dq, dS̄, dz̄, and those of φ."""
    plan = Plan(q)
    side = Contraction(
        query=True,
        other=dy,
        state=state,
        mass=mass,
        scaled=plan.tokens(),
        y=y,
        denominator=denominator,
        delta=plan.float32(plan.b, plan.h, plan.n),
        ratio=ratio,
    )
    dq = plan.tokens()
    dstate, dmass, *of_map = _map_gradients(q, dq, side, phi, None, 0, weights)
    assert side.delta is not None
    return side.scaled, side.delta, dq, dstate, dmass, *of_map


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
    side = Contraction(query=False, other=v, state=dstate / count, mass=dmass / count, scaled=dv)
    _, _, *of_map = _map_gradients(k, dk, side, phi, table, rate, weights)
    return dk, dv, *of_map


def _map_gradients(
    x: Tensor, dx: Tensor, side: Contraction, phi: Map, table: Tensor | None, rate: int, weights: bool
) -> tuple[Tensor, ...]:
    """Fills dx and the results of `side`; returns dS̄ and dz̄ (query side), dw1, db1, dw2, db2 (if `weights`)."""
    x, other, phi, plan = aligned(x), aligned(side.other), phi.like(x), Plan(x, phi.degree)
    count, heads = linear_count(plan.n, rate), plan.b * plan.h
    cuts = {name: plan.blocks(name) for name in ("feature_gradient", "input_gradient", "token_product")}
    step = max(cut.rows for cut in cuts.values())
    padded = triton.cdiv(count, step) * step
    state = dense(side.state.to(x.dtype))
    mass = side.mass.contiguous()
    tokens = token_set(table, rate)

    buffers = 3 if weights else 2
    per_head = buffers * padded * plan.f * x.element_size()
    rounds = triton.cdiv(heads * per_head, int(max(WORKSPACE_BYTES, WORKSPACE_TENSORS * x.numel() * x.element_size())))
    per_round = triton.cdiv(heads, rounds)
    work = torch.empty(buffers, per_round, padded, plan.f, dtype=x.dtype, device=x.device)
    features, grad_output = work[0], work[1]
    grad_hidden = work[0]  # takes the place of the features, tile by tile, once they have been used
    hidden = work[2] if weights else work[0]
    of_state = plan.float32(heads, plan.d + 1, plan.f) if side.query else None
    of_w1 = plan.float32(heads, plan.d + 1, plan.f) if weights else None
    of_w2 = plan.float32(heads, plan.f + 1, plan.f) if weights else None

    # What the rounds share is made once: a launch takes the host about as long as a kernel takes the device.
    shared = {"count": count, "padded": padded, "N": plan.n, "H": plan.h}
    cut = cuts["feature_gradient"]
    feature_tiles = padded // cut.rows * plan.p
    for_features = {
        "x": x,
        "g": other,
        "y": side.y,
        "denominator": side.denominator,
        "state": plan.matrix_argument(state, plan.d, plan.d),
        "mass": mass,
        "w1": plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        "b1": phi.b1,
        "w2": plan.matrix_argument(phi.w2, cut.hidden, plan.d),
        "b2": phi.b2,
        "scaled": side.scaled,
        "delta": side.delta,
        "hidden": plan.matrix_argument(hidden, cut.rows, cut.hidden),
        "features": plan.matrix_argument(features, cut.rows, plan.d),
        "grad_output": plan.matrix_argument(grad_output, cut.rows, plan.d),
        "ratio": side.ratio,
        "QUERY": side.query,
        "WEIGHTS": weights,
        **strides("x", x),
        **strides("g", other),
        **shared,
        **tokens,
        **plan.map_options(cut),
    }
    cut = cuts["input_gradient"]
    input_tiles = padded // cut.rows
    for_input = {
        "x": x,
        "state": plan.matrix_argument(state, plan.d, plan.d),
        "w1": plan.matrix_argument(phi.w1, plan.d, cut.hidden),
        "b1": phi.b1,
        "w2": plan.matrix_argument(phi.w2, cut.hidden, plan.d),
        "features": plan.matrix_argument(features, cut.rows, plan.d),
        "grad_output": plan.matrix_argument(grad_output, cut.rows, plan.d),
        "dx": dx,
        "dv": side.scaled,
        "grad_hidden": plan.matrix_argument(grad_hidden, cut.rows, cut.hidden),
        "QUERY": side.query,
        "WEIGHTS": weights,
        **strides("x", x),
        **shared,
        **tokens,
        **plan.map_options(cut),
    }
    products = {}
    if of_state is not None:
        all_tokens = shared | token_set(None, 0)
        products["state"] = TokenProduct(plan, side.scaled, features, side.delta, of_state, per_round, all_tokens)
    if of_w1 is not None and of_w2 is not None:
        products["w1"] = TokenProduct(plan, x, grad_hidden, None, of_w1, per_round, shared | tokens)
        products["w2"] = TokenProduct(plan, hidden, grad_output, None, of_w2, per_round, shared | tokens)

    for first in range(0, heads, per_round):
        now = min(per_round, heads - first)
        feature_gradient_kernel[feature_tiles, now](first=first, **for_features)
        if "state" in products:
            products["state"].add(first, now)
        input_gradient_kernel[input_tiles, now](first=first, **for_input)
        if weights:
            products["w1"].add(first, now)
            products["w2"].add(first, now)

    results = []
    if of_state is not None:
        product, total = of_state.unflatten(0, (plan.b, plan.h)).split((plan.d, 1), dim=2)
        results += [product.transpose(2, 3).contiguous() * side.ratio, total.squeeze(2) * -side.ratio]
    else:
        results += [plan.float32(0), plan.float32(0)]
    for stack in (of_w1, of_w2):
        if stack is not None:
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
