# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""What every kernel does with a tile of tokens: find them, load and store their rows, embed them.

With TMA (Hopper and later) tensors of tokens (b n h d) come as 3-D descriptors b × n × (h, d) and stacks of matrices as
2-D descriptors: the copy engine then moves whole tiles, without a register per pointer. Without, both come as pointers,
as tensors whose tokens are not consecutive always do. Offsets are 64-bit up to the tile.
"""

import triton
import triton.language as tl

from .activations import silu

kernel = triton.jit(
    do_not_specialize=["N", "M", "H", "B", "count", "first", "steps", "tiles", "shares", "heads", "stride_table"],  # type: ignore[arg-type]
)
"""Decorator of what is launched. Counts do not say how addresses are aligned: one compilation serves all their values,
where Triton would make another for those that 16 divides."""


@triton.jit
def linear_tokens(j, mask, table, RATE: tl.constexpr, TABLE: tl.constexpr):
    """Position (int64) of the j-th linear token: j for RATE 0 (all tokens), else RATE - 1 tokens of each run of RATE.

    The softmax tokens lead their runs, or stand where `table` (one head's positions) says if TABLE.
    """
    if RATE == 0:
        return j.to(tl.int64)
    run = j // (RATE - 1)
    within = j - run * (RATE - 1)
    start = run.to(tl.int64) * RATE
    if TABLE:
        within += (start + within >= tl.load(table + run, mask=mask, other=0)).to(tl.int32)
    else:
        within += 1
    return start + within


@triton.jit
def load_rows(ptr, rows, stride, mask, D: tl.constexpr):
    """Rows of D channels, zero where masked."""
    return tl.load(ptr + (rows * stride)[:, None] + tl.arange(0, D)[None, :], mask=mask[:, None], other=0.0)


@triton.jit
def store_rows(ptr, rows, stride, mask, x, D: tl.constexpr):
    """Store D channels of each row, in the dtype of the pointer, where not masked."""
    pointers = ptr + (rows * stride)[:, None] + tl.arange(0, D)[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask[:, None])


@triton.jit
def load_tile(
    x, b, h, start, n, stride_b, stride_n, stride_h, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """ROWS consecutive tokens of one batch entry and head, zero from the n-th on."""
    if TMA:
        tile = tl.reshape(x.load([b, start, h * stride_h]), (ROWS, D))
    else:
        row = tl.arange(0, ROWS)
        base = x + tl.cast(b, tl.int64) * stride_b + tl.cast(h, tl.int64) * stride_h
        base += tl.cast(start, tl.int64) * stride_n
        tile = load_rows(base, row, stride_n, start + row < n, D)
    return tile


@triton.jit
def store_tile(x, b, h, start, n, H, tile, ROWS: tl.constexpr, D: tl.constexpr, TMA: tl.constexpr):
    """Store ROWS consecutive tokens of a contiguous tensor, those before the n-th, in its dtype."""
    if TMA:
        x.store([b, start, h * D], tl.reshape(tile.to(x.dtype), (1, ROWS, D)))
    else:
        row = tl.arange(0, ROWS)
        base = x + ((tl.cast(b, tl.int64) * n + start) * H + h) * D
        store_rows(base, row, H * D, start + row < n, tile, D)


@triton.jit
def load_matrix(
    w, row, column, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """A ROWS × COLUMNS block, from (row, column), of a stack of matrices of WIDTH columns."""
    if TMA:
        block = w.load([row, column])
    else:
        base = w + tl.cast(row, tl.int64) * WIDTH + column
        block = tl.load(base + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :])
    return block


@triton.jit
def store_matrix(
    w, row, column, block, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):  # fmt: skip
    """Store a ROWS × COLUMNS block at (row, column) of a stack of matrices of WIDTH columns."""
    if TMA:
        w.store([row, column], block)
    else:
        base = w + tl.cast(row, tl.int64) * WIDTH + column
        tl.store(base + tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :], block)


@triton.jit
def load_vector(ptr, start, N: tl.constexpr):
    """N consecutive values as float32."""
    return tl.load(ptr + start + tl.arange(0, N)).to(tl.float32)


@triton.jit
def embed(
    x, w1, b1, w2, b2, head, first, kept, row, column,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, KEPT: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr,
    BJ: tl.constexpr, FAST: tl.constexpr, PREC: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """COUNT times WIDTH columns of ψ, from first·WIDTH on, before the last activation: accumulators of BM × WIDTH.

    The hidden layer goes by in chunks of BJ units, as keys and values do in attention, and is stored from (row, column)
    of `kept` on, which has KEPT columns (0: it is not). w1 (h·D × P·D) and w2 (h·P·D × P·D) are stacks of matrices,
    b1 and b2 h × P·D.

    The products stand in this order for a reason: Triton leaves the second in flight, its left operand in registers,
    and relies on the wait behind the first of the next chunk. An activation before that wait overwrites them. b2 comes
    last: as the accumulators' first value it costs ptxas some 20 registers in the gradient of φ's input.
    """
    F: tl.constexpr = P * D
    u = ()
    for _ in tl.static_range(COUNT):
        u += (tl.zeros((BM, WIDTH), tl.float32),)
    for j in range(0, F, BJ):
        w = load_matrix(w1, head * D, j, F, D, BJ, TMA)
        a = tl.dot(x, w, input_precision=PREC) + load_vector(b1, head * F + j, BJ)[None, :]
        a = silu(a, FAST).to(x.dtype)
        if KEPT:
            store_matrix(kept, row, column + j, a, KEPT, BM, BJ, TMA)
        added = ()
        for i in tl.static_range(COUNT):
            w = load_matrix(w2, head * F + j, (first + i) * WIDTH, F, BJ, WIDTH, TMA)
            added += (tl.dot(a, w, u[i], input_precision=PREC),)
        u = added
    biased = ()
    for i in tl.static_range(COUNT):
        biased += (u[i] + load_vector(b2, head * F + (first + i) * WIDTH, WIDTH)[None, :],)
    return biased
