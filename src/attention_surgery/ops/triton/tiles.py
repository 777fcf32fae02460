# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""What every kernel does with a tile of tokens: find them, load and store their rows, embed them.

Tensors of tokens (b n h d) come as 3-D descriptors b × n × (h, d flattened), weights as 2-D descriptors with the heads
stacked along the rows: on Hopper and later the copy engine then moves whole tiles, without a register per pointer.
Tokens that are not consecutive are addressed by pointers, with 64-bit rows.
"""

import triton
import triton.language as tl

from .activations import silu


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
def load_tile(x, b, start, column, ROWS: tl.constexpr, D: tl.constexpr):
    """ROWS consecutive tokens of one batch entry and head, zero beyond the last."""
    return tl.reshape(x.load([b, start, column]), (ROWS, D))


@triton.jit
def store_tile(x, b, start, column, tile, ROWS: tl.constexpr, D: tl.constexpr):
    """Store ROWS consecutive tokens in the dtype of the descriptor; those beyond the last are dropped."""
    x.store([b, start, column], tl.reshape(tile.to(x.dtype), (1, ROWS, D)))


@triton.jit
def load_vector(ptr, start, N: tl.constexpr):
    """N consecutive values as float32."""
    return tl.load(ptr + start + tl.arange(0, N)).to(tl.float32)


@triton.jit
def embed(
    x, w1, b1, w2, b2, head, first, kept, row,
    COUNT: tl.constexpr, KEEP: tl.constexpr, BM: tl.constexpr, D: tl.constexpr, P: tl.constexpr, BJ: tl.constexpr,
    FAST: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Slices first … first + COUNT - 1 of ψ before the last activation, for a tile x: COUNT accumulators BM × D.

    The hidden layer goes by in chunks of BJ units, as keys and values do in attention, and is stored from `row` of the
    descriptor `kept` if KEEP. w1 (h·D × P·D) and w2 (h·P·D × P·D) are descriptors, b1 and b2 (h × P·D) pointers.
    """
    F: tl.constexpr = P * D
    u = ()
    for _ in tl.static_range(COUNT):
        u += (tl.zeros((BM, D), tl.float32),)
    for j in range(0, F, BJ):
        h = tl.dot(x, w1.load([head * D, j]), input_precision=PREC) + load_vector(b1, head * F + j, BJ)[None, :]
        a = silu(h, FAST).to(x.dtype)
        if KEEP:
            if first == 0:
                kept.store([row, j], a)
        added = ()
        for i in tl.static_range(COUNT):
            added += (tl.dot(a, w2.load([head * F + j, (first + i) * D]), u[i], input_precision=PREC),)
        u = added
    biased = ()
    for i in tl.static_range(COUNT):
        biased += (u[i] + load_vector(b2, head * F + (first + i) * D, D)[None, :],)
    return biased
