# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""Gradients through φ, recomputed: for its input, its weights, and what it is contracted with.

The query side, y = (o + r·φ S̄) / (m + r·φ z̄) with denominator n, ŷ = dy/n and t = dy·y/n: do = ŷ,
dφ = r (ŷ S̄ᵀ - t z̄), dS̄ = r Σ φᵀ ŷ, dz̄ = -r Σ φ t. The key side, S̄ = mean φᵀ v and z̄ = mean φ:
dφ = (v dS̄ᵀ + dz̄) / n_L and dv = φ dS̄ / n_L. So both sides have dφ = g Sᵀ + c zᵀ: g = ŷ, c = -t, and S and z times r;
or g = v, c = 1, and S and z over n_L.

The first kernel makes ŷ and t. Then, a few heads at a time, the second makes the gradient of φ's input and leaves φ,
du, a = silu(x W1 + b1) and da in a work space, side by side: heads · padded tokens × 4·P·D (2·P·D, without a and da, if
no gradients of weights are wanted). du and da are the gradients of the second and first layer before their activations.
From them dv and all products over the tokens are taken, these in shares, which the last kernel sums into the gradients
of S, z and φ's parameters.
"""

import triton
import triton.language as tl

from .activations import power, power_grad, silu_grad, squareplus, squareplus_grad
from .tiles import embed, kernel, linear_tokens, load_matrix, load_rows, load_vector, store_matrix, store_rows


@kernel
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


@kernel
def map_gradient_kernel(
    x, g, delta, state, mass, w1, b1, w2, b2, table, added, dx, work, work_hidden,
    count, padded, N, H, first, zero,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr, WEIGHTS: tl.constexpr,
    BM: tl.constexpr, BJ: tl.constexpr, D: tl.constexpr, P: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr,
    TMA: tl.constexpr,
):  # fmt: skip
    """dx for a tile of tokens, with a contiguous gradient `added` to it or None, and their rows of the work space.

    Grid: (tiles, heads). `work` takes D columns of it at a time, `work_hidden` BJ; `first` is the first head (of b·h)
    of this round, `state` and `mass` are scaled. One power after the other, for the registers' sake; so is a value
    of φ kept in the dtype of x until its slope is taken, and `zero`, which is 0, has c, and the addresses of the last
    loop (with TMA) and of dx, found where they are needed. du is stored even where no gradient needs it: ptxas else
    puts its rounding off, and spills what is not rounded yet.
    """
    F: tl.constexpr = P * D
    WORK: tl.constexpr = 4 * F if WEIGHTS else 2 * F
    bh = first + tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    row = tl.program_id(1) * padded + tl.program_id(0) * BM

    xt = load_rows(x + b * stride_xb + h.to(tl.int64) * stride_xh, rows, stride_xn, mask, D)
    gt = load_rows(g + b * stride_gb + h.to(tl.int64) * stride_gh, rows, stride_gn, mask, D)
    du = ()
    for p in tl.static_range(P):
        u = embed(
            xt, w1, b1, w2, b2, h, p, work_hidden, row, 2 * F, 1, D, WORK if WEIGHTS and p == 0 else 0,
            BM, D, P, BJ, FAST, PREC, TMA,
        )  # fmt: skip
        value = squareplus(u[0], FAST)
        store_matrix(work, row, p * D, power(value, p + 1).to(xt.dtype), WORK, BM, D, TMA)
        value = value.to(xt.dtype)
        s = load_matrix(state, bh * F + p * D, 0, D, D, D, TMA)
        z = load_vector(mass, bh * F + p * D, D)
        if QUERY:
            c = -tl.load(delta + bh.to(tl.int64) * N + rows + p * zero, mask=mask, other=0.0)
        else:
            c = tl.where(mask, 1.0, 0.0)
        df = tl.dot(gt, tl.trans(s), c[:, None] * z[None, :], input_precision=PREC)
        slope = squareplus_grad(value.to(tl.float32), FAST)
        if p > 0:
            slope *= power_grad(value.to(tl.float32), p + 1)
        du += ((df * slope).to(xt.dtype),)
        store_matrix(work, row, F + p * D, du[p], WORK, BM, D, TMA)

    acc = tl.zeros((BM, D), tl.float32)
    for j in range(zero if TMA else 0, F, BJ):
        w = load_matrix(w1, h * D, j, F, D, BJ, TMA)
        a = tl.dot(xt, w, input_precision=PREC) + load_vector(b1, h * F + j, BJ)[None, :]
        da = tl.zeros((BM, BJ), tl.float32)
        for p in tl.static_range(P):
            w_p = load_matrix(w2, h * F + j, p * D, F, BJ, D, TMA)
            da = tl.dot(du[p], tl.trans(w_p), da, input_precision=PREC)
        da = (da * silu_grad(a, FAST)).to(xt.dtype)
        if WEIGHTS:
            store_matrix(work_hidden, row, 3 * F + j, da, WORK, BM, BJ, TMA)
        acc = tl.dot(da, tl.trans(w), acc, input_precision=PREC)
    token = (tl.program_id(0) + zero) * BM + tl.arange(0, BM)
    mask = token < count
    rows = linear_tokens(token, mask, table, RATE, TABLE)
    bh = first + tl.program_id(1) + zero
    b = (bh // H).to(tl.int64)
    h = bh % H
    if added is not None:
        acc += load_rows(added + (b * N * H + h) * D, rows, H * D, mask, D).to(tl.float32)
    store_rows(dx + (b * N * H + h) * D, rows, H * D, mask, acc, D)


@kernel
def value_gradient_kernel(
    work, state, table, dv, count, padded, N, H, first, stride_table,
    RATE: tl.constexpr, TABLE: tl.constexpr, WORK: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    PREC: tl.constexpr, TMA: tl.constexpr,
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
    for j in range(0, P * D, D):
        f = load_matrix(work, tl.program_id(1) * padded + tl.program_id(0) * BM, j, WORK, BM, D, TMA)
        s = load_matrix(state, bh * P * D + j, 0, D, D, D, TMA)
        acc = tl.dot(f, s, acc, input_precision=PREC)
    store_rows(dv + (b * N * H + h) * D, rows, H * D, mask, acc, D)


@kernel
def softmax_tokens_kernel(
    dk_soft, dv_soft, dk, dv, table, M, N, H,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_table,
    RATE: tl.constexpr, TABLE: tl.constexpr, BM: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """The softmax tokens' gradients (b m h d) to their rows of dk and dv. Grid: (tiles of BM of them, b · h)."""
    bh = tl.program_id(1)
    b = (bh // H).to(tl.int64)
    h = bh % H
    j = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    mask = j < M
    if TABLE:
        rows = tl.load(table + h * stride_table + j, mask=mask, other=0)
    else:
        rows = j * RATE
    out = (b * N * H + h) * D
    tile = load_rows(dk_soft + b * stride_kb + h.to(tl.int64) * stride_kh, j, stride_kn, mask, D)
    store_rows(dk + out, rows, H * D, mask, tile, D)
    tile = load_rows(dv_soft + b * stride_vb + h.to(tl.int64) * stride_vh, j, stride_vn, mask, D)
    store_rows(dv + out, rows, H * D, mask, tile, D)


@kernel
def token_product_kernel(
    x, g, delta, work, table, product, count, padded, steps, N, H, first, record, share,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: tl.constexpr, WEIGHTS: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr,
    BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Products over a share of the tokens, D × D at a time, of one head: gᵀ φ if QUERY; xᵀ da and aᵀ du if WEIGHTS.

    Grid: (D × D tiles, shares, heads). Results, float32, are `share` apart from one share to the next and `record` from
    one head (of b·h) to the next: the matrices' rows, of P·D columns, one product below the other, then a row for each:
    the sums over the tokens of t φ, of da and of du.
    """
    tile = tl.program_id(0)
    split = tl.program_id(1)
    bh = first + tl.program_id(2)
    b = (bh // H).to(tl.int64)
    h = bh % H
    if TABLE:
        table += h * stride_table
    start = split * steps * BM
    stop = tl.minimum(start + steps * BM, padded)
    row = tl.program_id(2) * padded
    product += split.to(tl.int64) * share + bh.to(tl.int64) * record
    rows: tl.constexpr = D * (QUERY + (1 + P) * WEIGHTS)
    if QUERY:
        if tile < P:
            left = g + b * stride_gb + h.to(tl.int64) * stride_gh
            acc, sums = _product(
                left, stride_gn, 0, work, row, tile, delta + bh.to(tl.int64) * N, table, start, stop, count,
                True, True, True, RATE, TABLE, WEIGHTS, BM, D, P, PREC, TMA,
            )  # fmt: skip
            _store_block(product, acc, 0, tile, D, D, P)
            _store_row(product, sums, rows, tile, D, P)
    if WEIGHTS:
        tile -= P * QUERY
        if (tile >= 0) & (tile < P):
            left = x + b * stride_xb + h.to(tl.int64) * stride_xh
            acc, sums = _product(
                left, stride_xn, 0, work, row, 3 * P + tile, None, table, start, stop, count,
                True, True, False, RATE, TABLE, WEIGHTS, BM, D, P, PREC, TMA,
            )  # fmt: skip
            _store_block(product, acc, D * QUERY, tile, D, D, P)
            _store_row(product, sums, rows + QUERY, tile, D, P)
        tile -= P
        if (tile >= 0) & (tile < P):
            acc, sums = _product(
                work, 0, 2 * P, work, row, P + tile, None, table, start, stop, count,
                False, True, False, RATE, TABLE, WEIGHTS, BM, D, P, PREC, TMA,
            )  # fmt: skip
            _store_block(product, acc, D * (QUERY + 1), tile, D, D, P)
            _store_row(product, sums, rows + QUERY + 1, tile, D, P)
        if tile >= P:
            acc, _ = _product(
                work, 0, 2 * P + tile // P, work, row, P + tile % P, None, table, start, stop, count,
                False, False, False, RATE, TABLE, WEIGHTS, BM, D, P, PREC, TMA,
            )  # fmt: skip
            _store_block(product, acc, D * (QUERY + 1) + tile // P * D, tile % P, D, D, P)


@triton.jit
def _product(
    left, stride, left_column, right, row, column, weight, table, start, stop, count,
    TOKENS: tl.constexpr, SUMS: tl.constexpr, WEIGHTED: tl.constexpr, RATE: tl.constexpr, TABLE: tl.constexpr,
    WEIGHTS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """leftᵀ right (D × D) over tokens from `start` to `stop`, and the sums of right if SUMS, weighted if WEIGHTED.

    `right` is in the work space, from `row` on, and so is `left`, unless it is one head of a tensor of tokens (TOKENS).
    Columns count D channels.
    """
    WORK: tl.constexpr = 4 * P * D if WEIGHTS else 2 * P * D
    acc = tl.zeros((D, D), tl.float32)
    sums = tl.zeros((BM, D), tl.float32)
    for t in range(start, stop, BM):
        token = t + tl.arange(0, BM)
        mask = token < count
        rt = load_matrix(right, row + t, column * D, WORK, BM, D, TMA)
        if TOKENS:
            lt = load_rows(left, linear_tokens(token, mask, table, RATE, TABLE), stride, mask, D)
        else:
            lt = load_matrix(left, row + t, left_column * D, WORK, BM, D, TMA)
        acc = tl.dot(tl.trans(lt), rt, acc, input_precision=PREC)
        if WEIGHTED:
            sums += rt.to(tl.float32) * tl.load(weight + token, mask=mask, other=0.0)[:, None]
        elif SUMS:
            sums += rt.to(tl.float32)
    return acc, tl.sum(sums, 0)


@triton.jit
def _store_block(out, block, row, column, ROWS: tl.constexpr, D: tl.constexpr, P: tl.constexpr):
    """ROWS rows from `row` on, and D columns, of a matrix of P·D columns."""
    pointers = out + (row + tl.arange(0, ROWS))[:, None] * (P * D) + column * D + tl.arange(0, D)[None, :]
    tl.store(pointers, block)


@triton.jit
def _store_row(out, values, row, column, D: tl.constexpr, P: tl.constexpr):
    tl.store(out + row * (P * D) + column * D + tl.arange(0, D), values)


@kernel
def sum_products_kernel(
    product, dstate, dmass, dw1, db1, dw2, db2, shares, B, H, record, share, scale,
    QUERY: tl.constexpr, WEIGHTS: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """Sums the shares of `token_product_kernel` in a fixed order into dS̄, dz̄ and, over the batch, φ's gradients.

    Grid: (BM rows × D columns of the products, heads).
    """
    column = tl.program_id(0) % P
    row = tl.program_id(0) // P * BM
    h = tl.program_id(1)
    product += h.to(tl.int64) * record
    rows: tl.constexpr = D * (QUERY + (1 + P) * WEIGHTS)
    unit = tl.arange(0, BM)
    channel = tl.arange(0, D)
    if QUERY:
        if row < D:
            for b in range(B):
                head = (b * H + h).to(tl.int64) * P * D + column * D
                matrix, sums = _add_shares(product, row, rows, column, b, 1, shares, H, record, share, BM, D, P)
                transposed = dstate + (head + channel)[:, None] * D + row + unit[None, :]
                tl.store(transposed, tl.trans(matrix) * scale)
                if row == 0:
                    tl.store(dmass + head + channel, sums * -scale)
    if WEIGHTS:
        inner = row - D * QUERY
        if (inner >= 0) & (inner < D):
            matrix, sums = _add_shares(product, row, rows + QUERY, column, 0, B, shares, H, record, share, BM, D, P)
            _store_block(dw1 + h * D * P * D, matrix, inner, column, BM, D, P)
            if inner == 0:
                _store_row(db1, sums, h, column, D, P)
        inner -= D
        if inner >= 0:
            matrix, sums = _add_shares(product, row, rows + QUERY + 1, column, 0, B, shares, H, record, share, BM, D, P)
            _store_block(dw2 + h * P * D * P * D, matrix, inner, column, BM, D, P)
            if inner == 0:
                _store_row(db2, sums, h, column, D, P)


@triton.jit
def _add_shares(
    product, row, last, column, b, count, shares, H, record, share, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr
):  # fmt: skip
    """BM rows of D columns from `row` on, and of row `last`, over `count` batch entries from `b` on and all shares."""
    channel = column * D + tl.arange(0, D)
    matrix = tl.zeros((BM, D), tl.float32)
    sums = tl.zeros((D,), tl.float32)
    for i in range(count * shares):
        base = product + (b + i // shares).to(tl.int64) * H * record + (i % shares).to(tl.int64) * share
        matrix += tl.load(base + (row + tl.arange(0, BM))[:, None] * (P * D) + channel[None, :])
        sums += tl.load(base + last * (P * D) + channel)
    return matrix, sums
