"""The kernels as PyTorch operators: fake implementations, autograd and FLOP formulas, so that compilers see through.

`attention_surgery::merge` and `::attend` are differentiable, the others within the functions of `functions`. All
gradients are operators too. FLOPs are two per multiply-add of the matrix products of Eq. 5; a backward counts φ and the
scores once more, as recomputed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import backward, forward
from .plan import Map, Rotary, linear_count


def operator(function: Callable[..., Any]) -> Any:
    """Registers `function`, whose results are new tensors, as an operator of that name.

    As `torch.library.custom_op` does, without its checks at every call, which took the host 30 µs and more.
    """
    name = f"attention_surgery::{function.__name__}"
    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(name, "default", torch.compiler.disable(_on_its_device(function)))
    return getattr(torch.ops.attention_surgery, function.__name__).default


def _on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its first argument's GPU as the current one, where Triton launches its kernels."""

    def run(first: Tensor, *rest: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return function(first, *rest)
        return function(first, *rest)

    return run


def fake(of: Any) -> Callable[[Callable[..., Any]], Any]:
    """Registers the results' shapes and dtypes of an operator."""
    return torch.library.register_fake(of.name())


@operator
def rotary(
    q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor, eps_q: float, eps_k: float
) -> tuple[Tensor, Tensor]:
    return forward.rotary(Rotary(q, k, weight_q, weight_k, cos, sin, eps_q, eps_k))


@fake(rotary)
def _(q, k, weight_q, weight_k, cos, sin, eps_q, eps_k):
    b, n, c = q.shape
    size = b, n, c // cos.shape[1], cos.shape[1]
    return q.new_empty(size), k.new_empty(size)


@operator
def rotary_again(dstate: Tensor, k: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    """k of `rotary` within a backward. `dstate` is not read: no compiler can run the operator before it is there."""
    return forward.rotary_of_k(k, weight, cos, sin, eps)


@fake(rotary_again)
def _(dstate, k, weight, cos, sin, eps):
    b, n, c = k.shape
    return k.new_empty(b, n, c // cos.shape[1], cos.shape[1])


@operator
def rotary_backward(
    q_grad: Tensor, k_grad: Tensor, q: Tensor, k: Tensor, weight_q: Tensor, weight_k: Tensor, cos: Tensor, sin: Tensor,
    eps_q: float, eps_k: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward.rotary_gradients(q_grad, k_grad, Rotary(q, k, weight_q, weight_k, cos, sin, eps_q, eps_k))


@fake(rotary_backward)
def _(q_grad, k_grad, q, k, weight_q, weight_k, cos, sin, eps_q, eps_k):
    weights = (x.new_empty(x.shape, dtype=torch.float32) for x in (weight_q, weight_k))
    return q.new_empty(q.shape), k.new_empty(k.shape), *weights


@operator
def linear_state(
    k: Tensor, v: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, table: Tensor | None, rate: int
) -> tuple[Tensor, Tensor]:
    return forward.linear_state(k, v, Map(w1, b1, w2, b2), table, rate)


@fake(linear_state)
def _(k, v, w1, b1, w2, b2, table, rate):
    b, _, h, d = k.shape
    f = w1.shape[2]
    return k.new_empty(b, h, f, d, dtype=torch.float32), k.new_empty(b, h, f, dtype=torch.float32)


@operator
def linear_state_backward(
    dstate: Tensor, dmass: Tensor, dk_soft: Tensor | None, dv_soft: Tensor | None, k: Tensor, v: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, table: Tensor | None, rate: int, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    softmax = None if dk_soft is None or dv_soft is None else (dk_soft, dv_soft)
    return backward.state_gradients(dstate, dmass, softmax, k, v, Map(w1, b1, w2, b2), table, rate, weights)  # type: ignore[return-value]


@fake(linear_state_backward)
def _(dstate, dmass, dk_soft, dv_soft, k, v, w1, b1, w2, b2, table, rate, weights):
    return k.new_empty(k.shape), k.new_empty(k.shape), *_fake_map_gradients(weights, w1, b1, w2, b2)


@operator
def merge(
    q: Tensor, o: Tensor | None, state: Tensor, mass: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    ratio: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return forward.merge(q, o, state, mass, Map(w1, b1, w2, b2), ratio)


@fake(merge)
def _(q, o, state, mass, w1, b1, w2, b2, ratio):
    b, n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, h, n, dtype=torch.float32)


@operator
def merge_again(
    dout: Tensor, q: Tensor, o: Tensor, state: Tensor, mass: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    ratio: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`merge` within a backward. By `dout`, which it only waits for, a compiler cannot keep the forward's instead."""
    return forward.merge(q, o, state, mass, Map(w1, b1, w2, b2), ratio)


@fake(merge_again)
def _(dout, q, o, state, mass, w1, b1, w2, b2, ratio):
    b, n, h, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(b, h, n, dtype=torch.float32)


@operator
def output_gradient(dy: Tensor, y: Tensor, denominator: Tensor) -> tuple[Tensor, Tensor]:
    return backward.output_gradients(dy, y, denominator)


@fake(output_gradient)
def _(dy, y, denominator):
    return torch.empty_like(y), torch.empty_like(denominator)


@operator
def merge_backward(
    scaled: Tensor, delta: Tensor, dq_soft: Tensor | None, q: Tensor, state: Tensor, mass: Tensor,
    w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, ratio: float, weights: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return backward.merge_gradients(scaled, delta, dq_soft, q, state, mass, Map(w1, b1, w2, b2), ratio, weights)  # type: ignore[return-value]


@fake(merge_backward)
def _(scaled, delta, dq_soft, q, state, mass, w1, b1, w2, b2, ratio, weights):
    return (
        q.new_empty(q.shape),
        state.new_empty(state.shape),
        mass.new_empty(mass.shape),
        *_fake_map_gradients(weights, w1, b1, w2, b2),
    )


@operator
def attend(
    q: Tensor, k: Tensor, v: Tensor, state: Tensor, mass: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    ratio: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    o, softmax_mass, top = forward.attend(q, k, v)
    return *forward.merge(q, o, state, mass, Map(w1, b1, w2, b2), ratio, softmax_mass), top


@fake(attend)
def _(q, k, v, state, mass, w1, b1, w2, b2, ratio):
    b, n, h, _ = q.shape
    rows = q.new_empty(b, h, n, dtype=torch.float32)
    return q.new_empty(q.shape), rows, torch.empty_like(rows)


@operator
def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, scaled: Tensor, delta: Tensor, top: Tensor, linear_grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return backward.attend_gradients(q, k, v, scaled, delta, top, linear_grad)


@fake(attend_backward)
def _(q, k, v, scaled, delta, top, linear_grad):
    return q.new_empty(q.shape), k.new_empty(k.shape), k.new_empty(k.shape)


def _fake_map_gradients(weights: bool, *parameters: Tensor) -> list[Tensor]:
    return [p.new_empty(p.shape if weights else (0,), dtype=torch.float32) for p in parameters]


def _keep_merge(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, o, *rest, ctx.ratio = inputs
    ctx.softmax = o is not None
    ctx.save_for_backward(*output, q, *rest)


def _merge_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
    y, denominator, *rest = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[4:8])
    scaled, delta = output_gradient(dy, y, denominator)
    dq, dstate, dmass, *of_map = merge_backward(scaled, delta, None, *rest, ctx.ratio, weights)
    return dq, scaled if ctx.softmax else None, dstate, dmass, *(of_map if weights else [None] * 4), None


torch.library.register_autograd(merge.name(), _merge_backward, setup_context=_keep_merge)


def _keep_attend(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *rest, ctx.ratio = inputs
    ctx.save_for_backward(k, v, output[2], *output[:2], q, *rest)


def _attend_backward(ctx: Any, dy: Tensor, _: Tensor, __: Tensor) -> tuple[Any, ...]:
    k, v, top, y, denominator, *rest = ctx.saved_tensors
    weights = any(ctx.needs_input_grad[5:9])
    scaled, delta = output_gradient(dy, y, denominator)
    linear_grad, dstate, dmass, *of_map = merge_backward(scaled, delta, None, *rest, ctx.ratio, weights)
    dq, dk, dv = attend_backward(rest[0], k, v, scaled, delta, top, linear_grad)
    return dq, dk, dv, dstate, dmass, *(of_map if weights else [None] * 4), None


torch.library.register_autograd(attend.name(), _attend_backward, setup_context=_keep_attend)


def _refuse(*_: Any) -> Any:
    raise NotImplementedError("no derivative: the kernels of hybrid attention are differentiable once")


for each in (
    rotary,
    rotary_again,
    rotary_backward,
    linear_state,
    linear_state_backward,
    merge_again,
    output_gradient,
    merge_backward,
    attend_backward,
):
    torch.library.register_autograd(each.name(), _refuse)


def _map_flops(tokens: int, w1: torch.Size) -> int:
    """φ of `tokens` tokens of every head, and one contraction with a state."""
    h, d, f = w1
    return 2 * tokens * h * (d * f + f * f + f * d)


def _linear_tokens(k: torch.Size, rate: int) -> int:
    return k[0] * linear_count(k[1], rate)


def _score_flops(q: torch.Size, k: torch.Size) -> int:
    """One product of queries with all softmax tokens."""
    b, n, h, d = q
    return 2 * b * h * n * k[1] * d


@register_flop_formula(torch.ops.attention_surgery.linear_state)
def _(k, v, w1, b1, w2, b2, table, rate, *, out_shape=None, **_):
    return _map_flops(_linear_tokens(k, rate), w1)


@register_flop_formula(torch.ops.attention_surgery.linear_state_backward)
def _(dstate, dmass, dk_soft, dv_soft, k, v, w1, b1, w2, b2, table, rate, weights, *, out_shape=None, **_):
    return (3 if weights else 2) * _map_flops(_linear_tokens(k, rate), w1)


@register_flop_formula(torch.ops.attention_surgery.merge)
def _(q, o, state, mass, w1, b1, w2, b2, ratio, *, out_shape=None, **_):
    return _map_flops(q[0] * q[1], w1)


@register_flop_formula(torch.ops.attention_surgery.merge_again)
def _(dout, q, o, state, mass, w1, b1, w2, b2, ratio, *, out_shape=None, **_):
    return _map_flops(q[0] * q[1], w1)


@register_flop_formula(torch.ops.attention_surgery.merge_backward)
def _(scaled, delta, dq_soft, q, state, mass, w1, b1, w2, b2, ratio, weights, *, out_shape=None, **_):
    return (3 if weights else 2) * _map_flops(q[0] * q[1], w1)


@register_flop_formula(torch.ops.attention_surgery.attend)
def _(q, k, v, state, mass, w1, b1, w2, b2, ratio, *, out_shape=None, **_):
    return 2 * _score_flops(q, k) + _map_flops(q[0] * q[1], w1)


@register_flop_formula(torch.ops.attention_surgery.attend_backward)
def _(q, k, v, scaled, delta, top, linear_grad, *, out_shape=None, **_):
    return 5 * _score_flops(q, k)
