# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""The softmax part of normalizer "max": attention over the softmax tokens that keeps its row maximum and its mass."""

import triton
import triton.language as tl

from .tiles import kernel, load_tile, store_tile


@kernel
def attend_kernel(
    q, k, v, o, mass, top, N, M, H, logit_scale,
    stride_qb, stride_qn, stride_qh, stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """o, Σ_j exp(s_ij - c_i) (`mass`) and c_i (`top`), for logits s in units of log2(e): `logit_scale` is log2(e)/√D.

    Grid: (tiles of BM queries, b · h). Only the last of the M keys are masked, in a step of their own.
    """
    start = tl.program_id(0) * BM
    bh = tl.program_id(1)
    b = bh // H
    h = bh % H
    x = load_tile(q, b, h, start, N, stride_qb, stride_qn, stride_qh, BM, D, TMA)
    highest = tl.full((BM,), float("-inf"), tl.float32)
    weight = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    whole = M // BN * BN
    for j in range(0, whole, BN):
        kt = load_tile(k, b, h, j, M, stride_kb, stride_kn, stride_kh, BN, D, TMA)
        vt = load_tile(v, b, h, j, M, stride_vb, stride_vn, stride_vh, BN, D, TMA)
        logits = tl.dot(x, tl.trans(kt), input_precision=PREC)
        acc, weight, highest = _add(acc, weight, highest, logits, vt, logit_scale, PREC)
    if whole < M:
        kt = load_tile(k, b, h, whole, M, stride_kb, stride_kn, stride_kh, BN, D, TMA)
        vt = load_tile(v, b, h, whole, M, stride_vb, stride_vn, stride_vh, BN, D, TMA)
        logits = tl.dot(x, tl.trans(kt), input_precision=PREC)
        logits = tl.where((whole + tl.arange(0, BN) < M)[None, :], logits, float("-inf"))
        acc, weight, highest = _add(acc, weight, highest, logits, vt, logit_scale, PREC)
    store_tile(o, b, h, start, N, H, acc / weight[:, None], BM, D, TMA)
    rows = start + tl.arange(0, BM)
    vector = bh.to(tl.int64) * N + rows
    tl.store(mass + vector, weight, mask=rows < N)
    tl.store(top + vector, highest, mask=rows < N)


@triton.jit
def _add(acc, weight, highest, logits, vt, logit_scale, PREC: tl.constexpr):
    """One step of the running softmax."""
    higher = tl.maximum(highest, tl.max(logits, 1) * logit_scale)
    probability = tl.exp2(logits * logit_scale - higher[:, None])
    shrink = tl.exp2(highest - higher)
    weight = weight * shrink + tl.sum(probability, 1)
    acc = tl.dot(probability.to(vt.dtype), vt, acc * shrink[:, None], input_precision=PREC)
    return acc, weight, higher
