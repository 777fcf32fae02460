# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""Gradients through φ, recomputed: for its input, its weights, and what it is contracted with.

The query side, y = (o + r·φ S̄) / (m + r·φ z̄) with denominator n, ŷ = dy/n and t = dy·y/n: do = ŷ,
dφ = r (ŷ S̄ᵀ - t z̄), dS̄ = r Σ φᵀ ŷ, dz̄ = -r Σ φ t. The key side, S̄ = mean φᵀ v and z̄ = mean φ:
dφ = (v dS̄ᵀ + dz̄) / n_L and dv = φ dS̄ / n_L. So both sides have dφ = g Sᵀ + c zᵀ: g = ŷ, c = -t, and S and z times r;
or g = v, c = 1, and S and z over n_L.

The first kernel makes ŷ and t. Then, a few heads at a time, the second makes the gradient of φ's input and leaves φ,
a = silu(x W1 + b1) and the gradients of both layers' pre-activations in a work space (heads · padded tokens × P·D),
from which the others take their products: dv, and those over the tokens.
"""

import triton
import triton.language as tl

from .activations import power, power_grad, silu_grad, squareplus, squareplus_grad
from .tiles import embed, linear_tokens, load_matrix, load_rows, load_vector, store_matrix, store_rows


@triton.jit
def output_gradient_kernel(
    dy, y, denominator, scaled, delta, N, H, stride_yb, stride_yn, stride_yh, BM: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """ŷ = dy/n (`scaled`) and t = dy·y/n (`delta`). Grid: (tiles of BM tokens, b · h)."""
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = rows < N
    out = (b * N * H + h) * D
    vector = bh.to(tl.int64) * N + rows
    g = load_rows(dy + b * stride_yb + h.to(tl.int64) * stride_yh, rows, stride_yn, mask, D).to(tl.float32)
    g /= tl.load(denominator + vector, mask=mask, other=1.0)[:, None]
    store_rows(scaled + out, rows, H * D, mask, g, D)
    tl.store(delta + vector, tl.sum(g * load_rows(y + out, rows, H * D, mask, D).to(tl.float32), 1), mask=mask)


@triton.jit
def map_gradient_kernel(
    x, g, delta, state, mass, w1, b1, w2, b2, table, dx, features, hidden, grad_output, grad_hidden,
    count, padded, N, H, first, scale, zero,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr, WEIGHTS: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dx for a tile of tokens, and φ (`features`); a (`hidden`) and both layers' gradients if WEIGHTS.

    Grid: (tiles, heads); `first` is the first head (of b·h) of this round. `mass` is z before it is scaled. One power
    after the other, for the registers' sake; so is a value of φ kept in the dtype of x until its slope is taken, and
    `zero`, which is 0, has the rows of dx found anew at the end.
    """
    F: tl.constexpr = P * D
    bh = first + tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    work = tl.program_id(1) * padded + tl.program_id(0) * BM

    xt = load_rows(x + b * stride_xb + h.to(tl.int64) * stride_xh, rows, stride_xn, mask, D)
    gt = load_rows(g + b * stride_gb + h.to(tl.int64) * stride_gh, rows, stride_gn, mask, D)
    if QUERY:
        c = -scale * tl.load(delta + bh.to(tl.int64) * N + rows, mask=mask, other=0.0)
    else:
        c = tl.where(mask, scale, 0.0)
    du = ()
    for p in tl.static_range(P):
        u = embed(xt, w1, b1, w2, b2, h, p, hidden, work, 1, D, WEIGHTS and p == 0, BM, D, P, BJ, FAST, PREC, TMA)
        value = squareplus(u[0], FAST)
        store_matrix(features, work, p * D, power(value, p + 1).to(xt.dtype), F, BM, D, TMA)
        value = value.to(xt.dtype)
        s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
        z = load_vector(mass, bh * F + p * D, D)
        df = tl.dot(gt, tl.trans(s), c[:, None] * z[None, :], input_precision=PREC)
        slope = squareplus_grad(value.to(tl.float32), FAST)
        if p > 0:
            slope *= power_grad(value.to(tl.float32), p + 1)
        du += ((df * slope).to(xt.dtype),)
        if WEIGHTS:
            store_matrix(grad_output, work, p * D, du[p], F, BM, D, TMA)

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
    token += zero
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    store_rows(dx + (b * N * H + h) * D, rows, H * D, mask, acc, D)


@triton.jit
def value_gradient_kernel(
    features, state, table, dv, count, padded, N, H, first, stride_table,
    RATE: tl.constexpr, TABLE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, F: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dv = φ S for a tile of linear tokens, φ from the work space. Grid: (tiles, heads)."""
    bh = first + tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    acc = tl.zeros((BM, D), tl.float32)
    for j in range(0, F, D):
        f = load_matrix(features, tl.program_id(1) * padded + tl.program_id(0) * BM, j, F, BM, D, TMA)
        s = load_matrix(state, bh * F + j, 0, D, D, D, TMA)
        acc = tl.dot(f, s, acc, input_precision=PREC)
    store_rows(dv + (b * N * H + h) * D, rows, H * D, mask, acc, D)


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
