# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""Gradients of the softmax part under normalizer "max", where the row maximum is a constant.

With P_ij = exp(s_ij - c_i) and the gradients dô_i of the numerator and -δ_i of the mass, ds_ij = P_ij (dô_i·v_j - δ_i).
"""

import triton.language as tl

from .tiles import kernel, load_tile, store_tile


@kernel
def query_gradient_kernel(
    q, k, v, grad, delta, top, linear_grad, dq, N, M, H, logit_scale, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq = linear_grad + scale · ds k. Grid: (tiles of BM queries, b · h)."""
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    rows = start + tl.arange(0, BM)
    vector = bh.to(tl.int64) * N + rows
    c = tl.load(top + vector, mask=rows < N, other=float("inf"))
    d = tl.load(delta + vector, mask=rows < N, other=0.0)
    x = load_tile(q, b, h, start, N, stride_qb, stride_qn, stride_qh, BM, D, TMA)
    g = load_tile(grad, b, h, start, N, tl.cast(N, tl.int64) * H * D, H * D, D, BM, D, TMA)
    acc = tl.zeros((BM, D), tl.float32)
    for j in range(0, M, BN):
        kt = load_tile(k, b, h, j, M, stride_kb, stride_kn, stride_kh, BN, D, TMA)
        vt = load_tile(v, b, h, j, M, stride_vb, stride_vn, stride_vh, BN, D, TMA)
        p = tl.exp2(tl.dot(x, tl.trans(kt), input_precision=PREC) * logit_scale - c[:, None])
        p = tl.where((j + tl.arange(0, BN) < M)[None, :], p, 0.0)
        ds = p * (tl.dot(g, tl.trans(vt), input_precision=PREC) - d[:, None])
        acc = tl.dot(ds.to(x.dtype), kt, acc, input_precision=PREC)
    linear = load_tile(linear_grad, b, h, start, N, tl.cast(N, tl.int64) * H * D, H * D, D, BM, D, TMA)
    acc = acc * scale + linear.to(tl.float32)
    store_tile(dq, b, h, start, N, H, acc, BM, D, TMA)


@kernel
def key_gradient_kernel(
    q, k, v, grad, delta, top, dk, dv, N, M, H, logit_scale, scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dk = scale · dsᵀ q and dv = Pᵀ dô. Grid: (tiles of BM softmax tokens, b · h), over tiles of BN queries."""
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    kt = load_tile(k, b, h, start, M, stride_kb, stride_kn, stride_kh, BM, D, TMA)
    vt = load_tile(v, b, h, start, M, stride_vb, stride_vn, stride_vh, BM, D, TMA)
    dk_acc = tl.zeros((BM, D), tl.float32)
    dv_acc = tl.zeros((BM, D), tl.float32)
    for i in range(0, N, BN):
        rows = i + tl.arange(0, BN)
        vector = bh.to(tl.int64) * N + rows
        c = tl.load(top + vector, mask=rows < N, other=float("inf"))
        d = tl.load(delta + vector, mask=rows < N, other=0.0)
        x = load_tile(q, b, h, i, N, stride_qb, stride_qn, stride_qh, BN, D, TMA)
        g = load_tile(grad, b, h, i, N, tl.cast(N, tl.int64) * H * D, H * D, D, BN, D, TMA)
        p = tl.exp2(tl.dot(kt, tl.trans(x), input_precision=PREC) * logit_scale - c[None, :])
        dv_acc = tl.dot(p.to(x.dtype), g, dv_acc, input_precision=PREC)
        ds = p * (tl.dot(vt, tl.trans(g), input_precision=PREC) - d[None, :])
        dk_acc = tl.dot(ds.to(x.dtype), x, dk_acc, input_precision=PREC)
    store_tile(dk, b, h, start, M, H, dk_acc * scale, BM, D, TMA)
    store_tile(dv, b, h, start, M, H, dv_acc, BM, D, TMA)
