# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""QK-norm and rotary position embedding of q and k in one pass over each, and the gradients of both.

y = w x / √(mean x² + ε) over all C channels of a token. Each pair (a, b) of y turns by an angle of its token and of its
place in the head: (a cos - b sin, a sin + b cos). All in float32. WIDTH is the power of two that holds C.
"""

import triton
import triton.language as tl

from .tiles import kernel


@triton.jit
def _load_pairs(ptr, C: tl.constexpr, WIDTH: tl.constexpr):
    """The C numbers at `ptr`, as first and second of each pair."""
    i = tl.arange(0, WIDTH)
    x = tl.load(ptr + i, mask=i < C, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(x, (WIDTH // 2, 2)))


@triton.jit
def _store_pairs(ptr, a, b, C: tl.constexpr, WIDTH: tl.constexpr):
    i = tl.arange(0, WIDTH)
    tl.store(ptr + i, tl.reshape(tl.join(a, b), (WIDTH,)).to(ptr.dtype.element_ty), mask=i < C)


@triton.jit
def _load_angles(cos, sin, C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Cosine and sine of each pair of every head. The tables hold each twice."""
    i = tl.arange(0, WIDTH)
    c, _ = tl.split(tl.reshape(tl.load(cos + i % D, mask=i < C, other=0.0).to(tl.float32), (WIDTH // 2, 2)))
    _, s = tl.split(tl.reshape(tl.load(sin + i % D, mask=i < C, other=0.0).to(tl.float32), (WIDTH // 2, 2)))
    return c, s


@triton.jit
def _inverse_rms(a, b, eps, C: tl.constexpr):
    return tl.rsqrt(tl.sum(a * a + b * b, 0) / C + eps)


@triton.jit
def _rotate(ptr, a, b, weight, c, s, eps, C: tl.constexpr, WIDTH: tl.constexpr):
    """One token of q or k, normalized and turned, to `ptr`."""
    inverse = _inverse_rms(a, b, eps, C)
    wa, wb = _load_pairs(weight, C, WIDTH)
    a *= inverse * wa
    b *= inverse * wb
    _store_pairs(ptr, a * c - b * s, a * s + b * c, C, WIDTH)


@kernel
def rotary_kernel(
    q, k, weight_q, weight_k, cos, sin, q_out, k_out, N, eps_q, eps_k,
    stride_qb, stride_qn, stride_kb, stride_kn, stride_cos, stride_sin,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """One token of q, unless it is None, and of k (b n c). Grid: (n, b)."""
    n = tl.program_id(0).to(tl.int64)
    b = tl.program_id(1).to(tl.int64)
    row = (b * N + n) * C
    if q is not None:
        q_a, q_b = _load_pairs(q + b * stride_qb + n * stride_qn, C, WIDTH)
    k_a, k_b = _load_pairs(k + b * stride_kb + n * stride_kn, C, WIDTH)
    c, s = _load_angles(cos + n * stride_cos, sin + n * stride_sin, C, D, WIDTH)
    if q is not None:
        _rotate(q_out + row, q_a, q_b, weight_q, c, s, eps_q, C, WIDTH)
    _rotate(k_out + row, k_a, k_b, weight_k, c, s, eps_k, C, WIDTH)


@triton.jit
def _gradient(
    grad, x, weight, cos, sin, dx, dweight, count, N, eps, stride_b, stride_n, stride_cos, stride_sin,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Of this program's tokens of q or k: their gradient, and its share of the weight's."""
    wa, wb = _load_pairs(weight, C, WIDTH)
    of_a = tl.zeros((WIDTH // 2,), tl.float32)
    of_b = tl.zeros((WIDTH // 2,), tl.float32)
    for token in range(tl.program_id(0), count, tl.num_programs(0)):
        entry = (token // N).to(tl.int64)
        n = (token % N).to(tl.int64)
        row = tl.cast(token, tl.int64) * C
        a, b = _load_pairs(x + entry * stride_b + n * stride_n, C, WIDTH)
        ga, gb = _load_pairs(grad + row, C, WIDTH)
        c, s = _load_angles(cos + n * stride_cos, sin + n * stride_sin, C, D, WIDTH)
        inverse = _inverse_rms(a, b, eps, C)
        a *= inverse
        b *= inverse
        turned_a = ga * c + gb * s
        turned_b = gb * c - ga * s
        of_a += turned_a * a
        of_b += turned_b * b
        ga = turned_a * wa
        gb = turned_b * wb
        mean = tl.sum(ga * a + gb * b, 0) / C
        _store_pairs(dx + row, inverse * (ga - a * mean), inverse * (gb - b * mean), C, WIDTH)
    _store_pairs(dweight + tl.program_id(0).to(tl.int64) * 2 * C, of_a, of_b, C, WIDTH)


@kernel
def rotary_gradient_kernel(
    q_grad, k_grad, q, k, weight_q, weight_k, cos, sin, dq, dk, dweights, count, N, eps_q, eps_k,
    stride_qb, stride_qn, stride_kb, stride_kn, stride_cos, stride_sin,
    C: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """dq or dk of every so-manieth of the b · n = `count` tokens, and a share of that weight's (shares 2 c).

    q, k and the tables may be strided, all else is dense. Grid: (shares, 2): q, k.
    """
    if tl.program_id(1) == 0:
        _gradient(
            q_grad, q, weight_q, cos, sin, dq, dweights, count, N, eps_q,
            stride_qb, stride_qn, stride_cos, stride_sin, C, D, WIDTH,
        )  # fmt: skip
    else:
        _gradient(
            k_grad, k, weight_k, cos, sin, dk, dweights + C, count, N, eps_k,
            stride_kb, stride_kn, stride_cos, stride_sin, C, D, WIDTH,
        )  # fmt: skip
