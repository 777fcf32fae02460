# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""S and z of Eq. 5: the linear tokens' φ_k(k)ᵀ v and φ_k(k), summed without φ_k ever in memory."""

import triton.language as tl

from .activations import power, silu, squareplus
from .tiles import kernel, linear_tokens, load_matrix, load_rows


@kernel
def state_kernel(
    k, v, w1, b1, w2, b2, table, state, count, H, tiles, zero,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_table,
    RATE: tl.constexpr, TABLE: tl.constexpr, RESIDENT: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """One power p of φ_k, one head, `tiles` tiles of linear tokens: a share of S̄_p (D × D) and z̄_p (D), float32.

    A record of `state` (shares b·h P·D·(D + 1)) has S̄, then z̄. Grid: (splits · P, b · h).

    Features run along the rows of every product, tokens along its columns: biases then cost two registers, and the
    features leave the second layer as the left operand of φᵀ v. RESIDENT keeps all weights of the slice in shared
    memory; otherwise they stream from L2 for every tile. `zero` is 0: it makes the biases' address depend on the tile,
    so that the compiler does not keep them in registers across the loop.
    """
    F: tl.constexpr = P * D
    p = tl.program_id(0) % P
    split = tl.program_id(0) // P
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    k += b * stride_kb + h.to(tl.int64) * stride_kh
    v += b * stride_vb + h.to(tl.int64) * stride_vh
    if TABLE:
        table += h * stride_table
    unit = tl.arange(0, BJ)
    feature = tl.arange(0, D)
    dtype: tl.constexpr = k.dtype.element_ty

    if RESIDENT:
        first_layer = ()
        second_layer = ()
        for j in tl.static_range(0, F, BJ):
            first_layer += (load_matrix(w1, h * D, j, F, D, BJ, TMA),)
            second_layer += (load_matrix(w2, h * F + j, p * D, F, BJ, D, TMA),)
    s = tl.zeros((D, D), tl.float32)
    z = tl.zeros((D,), tl.float32)
    for tile in range(split * tiles, (split + 1) * tiles):
        token = tile * BM + tl.arange(0, BM)
        mask = token < count
        rows = linear_tokens(token, mask, table, RATE, TABLE)
        kt = load_rows(k, rows, stride_kn, mask, D)
        vt = load_rows(v, rows, stride_vn, mask, D)
        bias = b1 + h * F + tile * zero
        u = tl.zeros((D, BM), tl.float32)
        if RESIDENT:
            for i in tl.static_range(F // BJ):
                x = tl.dot(tl.trans(first_layer[i]), tl.trans(kt), input_precision=PREC)
                a = silu(x + tl.load(bias + i * BJ + unit).to(tl.float32)[:, None], FAST)
                u = tl.dot(tl.trans(second_layer[i]), a.to(dtype), u, input_precision=PREC)
        else:
            for j in range(0, F, BJ):
                w = load_matrix(w1, h * D, j, F, D, BJ, TMA)
                x = tl.dot(tl.trans(w), tl.trans(kt), input_precision=PREC)
                a = silu(x + tl.load(bias + j + unit).to(tl.float32)[:, None], FAST)
                w = load_matrix(w2, h * F + j, p * D, F, BJ, D, TMA)
                u = tl.dot(tl.trans(w), a.to(dtype), u, input_precision=PREC)
        u += tl.load(b2 + h * F + p * D + tile * zero + feature).to(tl.float32)[:, None]
        f = power(squareplus(u, FAST), p + 1)
        if (tile + 1) * BM > count:  # rows of v past the last token are zero; their features are not
            f = tl.where(mask[None, :], f, 0.0)
        z += tl.sum(f, 1)
        s = tl.dot(f.to(dtype), vt, s, input_precision=PREC)
    record = state + (split * tl.num_programs(1) + bh).to(tl.int64) * (F * (D + 1))
    tl.store(record + (p * D + feature)[:, None] * D + feature[None, :], s / count)
    tl.store(record + F * D + p * D + feature, z / count)


@kernel
def sum_states_kernel(states, state, mass, shares, heads, BLOCK: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """S̄ (heads P·D D) and z̄ (heads P·D): the shares of `state_kernel`, summed in their order.

    Grid: (blocks of BLOCK numbers of a record, heads).
    """
    STATE: tl.constexpr = P * D * D
    MASS: tl.constexpr = P * D
    head = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for share in range(shares):
        record = states + (share * heads + head) * (STATE + MASS)
        total += tl.load(record + i, mask=i < STATE + MASS, other=0.0)
    tl.store(state + head * STATE + i, total, mask=i < STATE)
    tl.store(mass + head * MASS + i - STATE, total, mask=(i >= STATE) & (i < STATE + MASS))
