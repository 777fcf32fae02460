# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""The two forward kernels that end Eq. 5: φ_q(q) on the fly, its contraction with the state, and the merge.

y = (o + r·φ_q S̄) / (m + r·φ_q z̄), with o and m the softmax part's numerator and mass.
"""

import triton
import triton.language as tl

from .activations import power, squareplus
from .tiles import embed, load_matrix, load_tile, load_vector, store_tile


@triton.jit
def merge_kernel(
    q, o, state, mass, w1, b1, w2, b2, y, denominator, N, H, ratio,
    stride_qb, stride_qn, stride_qh, stride_ob, stride_on, stride_oh,
    SOFTMAX: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    FAST: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Normalizer "mean": o is softmax attention over the softmax tokens, m is 1. Without SOFTMAX ("linear") both are 0.

    Grid: (tiles of BM tokens, b · h). `state` (b·h·P·D × D) is in the dtype of q, `mass` float32.
    """
    F: tl.constexpr = P * D
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    x = load_tile(q, b, h, start, N, stride_qb, stride_qn, stride_qh, BM, D, TMA)
    u = embed(x, w1, b1, w2, b2, h, 0, None, 0, P, False, BM, D, P, BJ, FAST, PREC, TMA)
    numerator = tl.zeros((BM, D), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    for p in tl.static_range(P):
        f = power(squareplus(u[p], FAST), p + 1)
        weight += tl.sum(f * load_vector(mass, bh * F + p * D, D)[None, :], 1)
        s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
        numerator = tl.dot(f.to(x.dtype), s, numerator, input_precision=PREC)
    numerator *= ratio
    weight *= ratio
    if SOFTMAX:
        o_tile = load_tile(o, b, h, start, N, stride_ob, stride_on, stride_oh, BM, D, TMA)
        numerator += o_tile.to(tl.float32)
        weight += 1.0
    store_tile(y, b, h, start, N, H, numerator / weight[:, None], BM, D, TMA)
    rows = start + tl.arange(0, BM)
    tl.store(denominator + bh.to(tl.int64) * N + rows, weight, mask=rows < N)


@triton.jit
def attend_kernel(
    q, k, v, state, mass, w1, b1, w2, b2, y, denominator, top, N, M, H,
    logit_scale, ratio,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    BM: tl.constexpr, BN: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    FAST: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Normalizer "max": attention over the M softmax tokens with the row maximum kept, then the linear part.

    Grid: (tiles of BM queries, b · h). `logit_scale` is log2(e)/√D; `top` receives the row maxima in that scale. The
    hidden layer of φ is computed once per power: P accumulators beside the attention's own would not fit.
    """
    F: tl.constexpr = P * D
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    x = load_tile(q, b, h, start, N, stride_qb, stride_qn, stride_qh, BM, D, TMA)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    numerator = tl.zeros((BM, D), tl.float32)
    for j in range(0, M, BN):
        kt = load_tile(k, b, h, j, M, stride_kb, stride_kn, stride_kh, BN, D, TMA)
        logits = tl.dot(x, tl.trans(kt), input_precision=PREC) * logit_scale
        if j + BN > M:
            logits = tl.where((j + tl.arange(0, BN) < M)[None, :], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        probability = tl.exp2(logits - higher[:, None])
        shrink = tl.exp2(highest - higher)
        weight = weight * shrink + tl.sum(probability, 1)
        numerator *= shrink[:, None]
        vt = load_tile(v, b, h, j, M, stride_vb, stride_vn, stride_vh, BN, D, TMA)
        numerator = tl.dot(probability.to(x.dtype), vt, numerator, input_precision=PREC)
        highest = higher
    numerator /= ratio
    weight /= ratio
    for p in tl.static_range(P):
        u = embed(x, w1, b1, w2, b2, h, p, None, 0, 1, False, BM, D, P, BJ, FAST, PREC, TMA)
        f = power(squareplus(u[0], FAST), p + 1)
        weight += tl.sum(f * load_vector(mass, bh * F + p * D, D)[None, :], 1)
        s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
        numerator = tl.dot(f.to(x.dtype), s, numerator, input_precision=PREC)
    store_tile(y, b, h, start, N, H, numerator / weight[:, None], BM, D, TMA)
    rows = start + tl.arange(0, BM)
    row_offset = bh.to(tl.int64) * N + rows
    tl.store(denominator + row_offset, weight * ratio, mask=rows < N)
    tl.store(top + row_offset, highest, mask=rows < N)
