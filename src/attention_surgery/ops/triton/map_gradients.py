# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""Gradients through φ, recomputed: for its input, its weights, and what it is contracted with.

The query side, y = (o + r·φ S̄) / (m + r·φ z̄) with denominator n, ŷ = dy/n and t = dy·y/n: do = ŷ,
dφ = r (ŷ S̄ᵀ - t z̄), dS̄ = r Σ φᵀ ŷ, dz̄ = -r Σ φ t. The key side, S̄ = mean φᵀ v and z̄ = mean φ:
dφ = v dS̄ᵀ + dz̄ and dv = φ dS̄, both over n_L.

Three kernels, one after the other, on a few heads at a time: the first two leave a = silu(x W1 + b1), φ and the
gradients of both layers' pre-activations in a work space (heads · padded tokens × P·D), the first layer's in place of
φ once that has been used; the third multiplies them over the tokens.
"""

import triton
import triton.language as tl

from .activations import power, power_grad, silu_grad, squareplus_and_grad
from .tiles import embed, linear_tokens, load_matrix, load_rows, load_vector, store_matrix, store_rows


@triton.jit
def feature_gradient_kernel(
    x, g, y, denominator, state, mass, w1, b1, w2, b2, table, scaled, delta, hidden, features, grad_output,
    count, padded, N, H, first, ratio,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr, WEIGHTS: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """φ, and the gradient of the second layer's output, of one power for a tile of tokens. Grid: (tiles · P, heads).

    Query side: g is dy, state and mass are S̄ and z̄; also stores ŷ (`scaled`) and t (`delta`). Key side: g is v, state
    and mass are dS̄/n_L and dz̄/n_L. a (`hidden`) is stored if WEIGHTS. `first` is the first head (of b·h) of this round.
    """
    F: tl.constexpr = P * D
    p = tl.program_id(0) % P
    tile = tl.program_id(0) // P
    bh = first + tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    token = tile * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    work = tl.program_id(1) * padded + tile * BM

    gt = load_rows(g + b * stride_gb + h.to(tl.int64) * stride_gh, rows, stride_gn, mask, D)
    if QUERY:
        out = (b * N * H + h) * D
        vector = bh.to(tl.int64) * N + rows
        inverse = 1.0 / tl.load(denominator + vector, mask=mask, other=1.0)
        t = tl.sum(gt.to(tl.float32) * load_rows(y + out, rows, H * D, mask, D).to(tl.float32), 1)
        if p == 0:
            store_rows(scaled + out, rows, H * D, mask, gt.to(tl.float32) * inverse[:, None], D)
            tl.store(delta + vector, t * inverse, mask=mask)
    xt = load_rows(x + b * stride_xb + h.to(tl.int64) * stride_xh, rows, stride_xn, mask, D)
    u = embed(xt, w1, b1, w2, b2, h, p, hidden, work, 1, WEIGHTS, BM, D, P, BJ, FAST, PREC, TMA)
    s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
    df = tl.dot(gt, tl.trans(s), input_precision=PREC)
    z = load_vector(mass, bh * F + p * D, D)[None, :]
    if QUERY:
        df = (ratio * inverse)[:, None] * (df - t[:, None] * z)
    else:
        df = tl.where(mask[:, None], df + z, 0.0)
    value, slope = squareplus_and_grad(u[0], FAST)
    if p > 0:
        slope *= power_grad(value, p + 1)
    store_matrix(grad_output, work, p * D, (df * slope).to(xt.dtype), F, BM, D, TMA)
    store_matrix(features, work, p * D, power(value, p + 1).to(xt.dtype), F, BM, D, TMA)


@triton.jit
def input_gradient_kernel(
    x, state, w1, b1, w2, table, features, grad_output, dx, dv, grad_hidden, count, padded, N, H, first,
    stride_xb, stride_xn, stride_xh, stride_table,
    QUERY: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr, WEIGHTS: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dx, and dv on the key side, for a tile of tokens; the first layer's gradient if WEIGHTS. Grid: (tiles, heads)."""
    F: tl.constexpr = P * D
    tile = tl.program_id(0)
    bh = first + tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    token = tile * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    work = tl.program_id(1) * padded + tile * BM
    out = (b * N * H + h) * D

    if not QUERY:
        acc = tl.zeros((BM, D), tl.float32)
        for p in range(P):
            f = load_matrix(features, work, p * D, F, BM, D, TMA)
            s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
            acc = tl.dot(f, s, acc, input_precision=PREC)
        store_rows(dv + out, rows, H * D, mask, acc, D)
    xt = load_rows(x + b * stride_xb + h.to(tl.int64) * stride_xh, rows, stride_xn, mask, D)
    du = ()
    for p in tl.static_range(P):
        du += (load_matrix(grad_output, work, p * D, F, BM, D, TMA),)
    acc = tl.zeros((BM, D), tl.float32)
    for j in range(0, F, BJ):
        w = load_matrix(w1, h * D, j, F, D, BJ, TMA)
        a = tl.dot(xt, w, input_precision=PREC) + load_vector(b1, h * F + j, BJ)[None, :]
        da = tl.zeros((BM, BJ), tl.float32)
        for p in tl.static_range(P):
            w_p = load_matrix(w2, h * F + j, p * D, F, BJ, D, TMA)
            da = tl.dot(du[p], tl.trans(w_p), da, input_precision=PREC)
        da = (da * silu_grad(a, FAST)).to(xt.dtype)
        if WEIGHTS:
            store_matrix(grad_hidden, work, j, da, F, BM, BJ, TMA)
        acc = tl.dot(da, tl.trans(w), acc, input_precision=PREC)
    store_rows(dx + out, rows, H * D, mask, acc, D)


@triton.jit
def token_product_kernel(
    left, right, weight, table, product, count, padded, steps, N, H, first,
    stride_lb, stride_ln, stride_lh, stride_table,
    TOKENS: tl.constexpr, WEIGHTED: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, L: tl.constexpr, R: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """leftᵀ right over a share of the tokens, D × D at a time, and the sum of right over them (weighted if WEIGHTED).

    Grid: (L · R, splits, heads). `right` (heads · padded × R·D) and, unless TOKENS, `left` (heads · padded × L·D) are
    in the work space; with TOKENS `left` is a tensor of tokens. Partial results, float32: splits × heads ×
    (L·D + 1) × R·D, the sum in the last row.
    """
    column = tl.program_id(0) % R
    row = tl.program_id(0) // R
    split = tl.program_id(1)
    head = tl.program_id(2)
    bh = first + head
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    if TOKENS:
        left += b * stride_lb + h.to(tl.int64) * stride_lh
    if WEIGHTED:
        weight += bh.to(tl.int64) * N
    start = split * steps * BM
    stop = tl.minimum(start + steps * BM, padded)
    out = split * tl.num_programs(2) + head
    acc = tl.zeros((D, D), tl.float32)
    channel = tl.arange(0, D)
    if row == 0:
        sums = tl.zeros((BM, D), tl.float32)
        for t in range(start, stop, BM):
            rt = load_matrix(right, head * padded + t, column * D, R * D, BM, D, TMA)
            lt = _left(left, table, head * padded, t, row, count, stride_ln, TOKENS, RATE, TABLE, BM, D, L, TMA)
            acc = tl.dot(tl.trans(lt), rt, acc, input_precision=PREC)
            if WEIGHTED:
                token = t + tl.arange(0, BM)
                sums += rt.to(tl.float32) * tl.load(weight + token, mask=token < count, other=0.0)[:, None]
            else:
                sums += rt.to(tl.float32)
        last = out.to(tl.int64) * (L * D + 1) + L * D
        tl.store(product + last * (R * D) + column * D + channel, tl.sum(sums, 0))
    else:
        for t in range(start, stop, BM):
            rt = load_matrix(right, head * padded + t, column * D, R * D, BM, D, TMA)
            lt = _left(left, table, head * padded, t, row, count, stride_ln, TOKENS, RATE, TABLE, BM, D, L, TMA)
            acc = tl.dot(tl.trans(lt), rt, acc, input_precision=PREC)
    cell = out.to(tl.int64) * (L * D + 1) + row * D + channel
    tl.store(product + cell[:, None] * (R * D) + column * D + channel[None, :], acc)


@triton.jit
def _left(
    left, table, base, t, row, count, stride,
    TOKENS: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
    L: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    if TOKENS:
        token = t + tl.arange(0, BM)
        mask = token < count
        tile = load_rows(left, linear_tokens(token, mask, table, RATE, TABLE), stride, mask, D)
    else:
        tile = load_matrix(left, base + t, row * D, L * D, BM, D, TMA)
    return tile
