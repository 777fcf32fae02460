# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""The end of Eq. 5: φ_q(q) on the fly, its contraction with the state, and the merge with the softmax part.

y = (m·o + r·φ_q S̄) / (m + r·φ_q z̄), with o the softmax part's output and m its mass.
"""

import triton.language as tl

from .activations import powers, squareplus
from .tiles import embed, kernel, load_matrix, load_tile, load_vector, store_tile


@kernel
def merge_kernel(
    q, o, softmax_mass, state, mass, w1, b1, w2, b2, y, denominator, N, H, ratio,
    stride_qb, stride_qn, stride_qh, stride_ob, stride_on, stride_oh,
    SOFTMAX: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, WIDTH: tl.constexpr,
    FAST: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """One tile of y, and its denominator. Without SOFTMAX ("linear") m is 0; without `softmax_mass` (b h n) it is 1.

    Features go by WIDTH at a time. Grid: (tiles of BM tokens, b · h). `state` (b·h·P·D × D) is in the dtype of q,
    `mass` float32.
    """
    F: tl.constexpr = P * D
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    x = load_tile(q, b, h, start, N, stride_qb, stride_qn, stride_qh, BM, D, TMA)
    u = embed(x, w1, b1, w2, b2, h, 0, None, 0, 0, F // WIDTH, WIDTH, 0, BM, D, P, BJ, FAST, PREC, TMA)
    numerator = tl.zeros((BM, D), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    for i in tl.static_range(F // WIDTH):
        f = powers(squareplus(u[i], FAST), i * WIDTH // D + 1, WIDTH, D)
        weight += tl.sum(f * load_vector(mass, bh * F + i * WIDTH, WIDTH)[None, :], 1)
        s = load_matrix(state, bh * F + i * WIDTH, 0, D, WIDTH, D, TMA)
        numerator = tl.dot(f.to(x.dtype), s, numerator, input_precision=PREC)
    numerator *= ratio
    weight *= ratio
    rows = start + tl.arange(0, BM)
    vector = bh.to(tl.int64) * N + rows
    if SOFTMAX:
        o_tile = load_tile(o, b, h, start, N, stride_ob, stride_on, stride_oh, BM, D, TMA).to(tl.float32)
        if softmax_mass is None:
            numerator += o_tile
            weight += 1.0
        else:
            m = tl.load(softmax_mass + vector, mask=rows < N, other=1.0)
            numerator += o_tile * m[:, None]
            weight += m
    store_tile(y, b, h, start, N, H, numerator / weight[:, None], BM, D, TMA)
    tl.store(denominator + vector, weight, mask=rows < N)
