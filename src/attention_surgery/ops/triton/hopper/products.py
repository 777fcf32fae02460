# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
"""Products over the tokens as `ops.triton.map_gradients` has them, with warps specialized. Head dim 128, degree 2.

A job is a product of 128 × 256 over the tokens, leftᵀ [right0 right1]: gᵀ[φ0 φ1] (QUERY), xᵀ[da0 da1], a0ᵀ[du0 du1] and
a1ᵀ[du0 du1] (WEIGHTS). So three blocks of 128 columns serve two products of 128 × 128, where one at a time would read
four. A program takes one job over one share of the tokens of one head, 64 tokens a step. A producer of four warps
brings left (64 × 128) and right (64 × 256) into a ring of four stages; two consumers, groups of four warps, have 64 of
left's 128 columns each, and so 64 of the job's 128 rows. Both operands have the tokens along the rows: left is read
transposed. While a step's product is under way its consumer sums columns over the same tokens, those of right0 and
right1, one each.

Barriers, one per stage: step i takes stage i % 4, for the i // 4-th time, of parity i // 4 & 1.

full[s]      what comes from the work space has landed: one arrival, the producer's, with the bytes.
gathered[s]  left has landed where it is one of x and g, whose tokens need not be consecutive: 128 arrivals, one by each
             thread of the producer. They are copied by generic writes: who waits fences before a product reads them.
empty[s]     both consumers have read the stage, 2 arrivals. Each does so a step late, when the product of the next step
             is under way.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..plan import cdiv
from ..tiles import linear_tokens
from .parts import GROUP_TOKENS, MATRIX, barriers, copy_in, copy_rows

_MATRIX = gl.constexpr(MATRIX)
_STAGES = gl.constexpr(4)
_STEP = gl.constexpr(GROUP_TOKENS)
"""Tokens of a step."""
_REGISTERS, _PRODUCER_REGISTERS = gl.constexpr(208), gl.constexpr(88)
"""Of the threads of a consumer, and of the producer."""
_BY_ROW = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
"""Of 8 rows × 128 channels, 16 bytes a thread."""

OVERHEAD = 8
"""Steps that a program's beginning and end take, and its share until it is added up."""


def split_steps(steps: int, programs: int, processors: int) -> tuple[int, int]:
    """Split `steps` so that `programs` per share fill the device in whole waves: (shares, steps of each)."""
    splits = []
    for waves in range(1, 5):
        each = cdiv(steps, max(1, min(steps, waves * processors // programs)))
        shares = cdiv(steps, each)
        splits.append((cdiv(shares * programs, processors) * (each + OVERHEAD), shares, each))
    _, shares, each = min(splits)
    return shares, each


@gluon.jit(
    do_not_specialize=[
        "count", "steps", "N", "H", "first", "stride_xb", "stride_xn", "stride_xh", "stride_gb", "stride_gn",
        "stride_gh", "stride_table",
    ]
)  # fmt: skip
def specialized_product_kernel(
    x, g, delta, left_work, right_work, table, product, count, padded, steps, N, H, first, record, share,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: gl.constexpr, WEIGHTS: gl.constexpr, RATE: gl.constexpr, TABLE: gl.constexpr,
    D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """What `token_product_kernel` does, of which arguments and results are. Grid: (jobs, shares, heads).

    `left_work` and `right_work` are the work space in blocks of 64 × 128 and 64 × 256. Strides of x and g are in units
    of 8 elements, and so rows begin at multiples of 16 bytes. `padded` is a multiple of 64.
    """
    gl.static_assert((D == 128) & (P == 2))
    lefts = gl.allocate_shared_memory(left_work.dtype, [_STAGES, _STEP, D], _MATRIX)
    rights = gl.allocate_shared_memory(left_work.dtype, [_STAGES, _STEP, P * D], _MATRIX)
    full, gathered, empty = barriers(_STAGES, 1), barriers(_STAGES, 128), barriers(_STAGES, 2)
    fence_async_shared()
    begin = gl.program_id(1) * steps
    end = gl.minimum(begin + steps, padded // _STEP)
    bh = first + gl.program_id(2)
    of_all = (lefts, rights, full, gathered, empty, begin, end, count)
    of_consumers = (of_all, delta, product, bh, N, record, share)
    gl.warp_specialize(
        [
            (_consume, (of_consumers, 0, QUERY, WEIGHTS, D, P)),
            (_consume, (of_consumers, 1, QUERY, WEIGHTS, D, P)),
            (_produce, (
                of_all, x, g, left_work, right_work, table, bh, H, padded,
                stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
                QUERY, WEIGHTS, RATE, TABLE, D, P,
            )),
        ],
        [4, 4],
        [_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _produce(
    of_all, x, g, left_work, right_work, table, bh, H, padded,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: gl.constexpr, WEIGHTS: gl.constexpr, RATE: gl.constexpr, TABLE: gl.constexpr,
    D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Three ways through the ring, one of which a job takes. In units of D columns the work space is φ, du, a, da."""
    lefts, rights, full, _, empty, begin, end, _ = of_all
    job = gl.program_id(0)
    row = gl.program_id(2) * padded
    b = bh // H
    h = bh - b * H
    if TABLE:
        table += h * stride_table
    if QUERY:
        if job == 0:
            left = g + (b.to(gl.int64) * stride_gb + h.to(gl.int64) * stride_gh) * 8
            _bring_tokens(of_all, left, stride_gn, right_work, row, 0, table, RATE, TABLE)
    if WEIGHTS:
        job -= 1 if QUERY else 0
        if job == 0:
            left = x + (b.to(gl.int64) * stride_xb + h.to(gl.int64) * stride_xh) * 8
            _bring_tokens(of_all, left, stride_xn, right_work, row, 3 * P * D, table, RATE, TABLE)
        if job > 0:
            for t in range(begin, end):
                stage = (t - begin) % _STAGES
                bar = full.index(stage)
                mbarrier.wait(empty.index(stage), ((t - begin) // _STAGES & 1) ^ 1)
                mbarrier.expect(bar, _STEP * (P + 1) * D * 2)
                copy_in(left_work, [row + t * _STEP, (2 * P + job - 1) * D], bar, lefts.index(stage))
                copy_in(right_work, [row + t * _STEP, P * D], bar, rights.index(stage))


@gluon.jit
def _bring_tokens(of_all, left, stride, right_work, row, column, table, RATE: gl.constexpr, TABLE: gl.constexpr):
    """A share of one head of x or g, zero from token `count` on, and its rows of the work space from `column` on."""
    lefts, rights, full, gathered, empty, begin, end, count = of_all
    D: gl.constexpr = lefts.shape[2]
    PIECE: gl.constexpr = 32  # rows at a time, so that their addresses find registers
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, _BY_ROW))
    for t in range(begin, end):
        stage = (t - begin) % _STAGES
        bar = full.index(stage)
        # The table is read ahead of the wait.
        tokens = ()
        for i in gl.static_range(0, _STEP, PIECE):
            token = t * _STEP + i + gl.arange(0, PIECE, layout=gl.SliceLayout(1, _BY_ROW))
            tokens += (linear_tokens(token, token < count, table, RATE, TABLE),)
        mbarrier.wait(empty.index(stage), ((t - begin) // _STAGES & 1) ^ 1)
        mbarrier.expect(bar, _STEP * rights.shape[2] * 2)
        copy_in(right_work, [row + t * _STEP, column], bar, rights.index(stage))
        slot = lefts.index(stage)
        for i in gl.static_range(0, _STEP, PIECE):
            token = t * _STEP + i + gl.arange(0, PIECE, layout=gl.SliceLayout(1, _BY_ROW))
            pointers = left + (tokens[i // PIECE] * stride * 8)[:, None] + channels[None, :]
            copy_rows(slot.slice(i, PIECE), pointers, mask=(token < count)[:, None])
        async_copy.mbarrier_arrive(gathered.index(stage), increment_count=False)


@gluon.jit
def _consume(
    of_consumers, C: gl.constexpr, QUERY: gl.constexpr, WEIGHTS: gl.constexpr, D: gl.constexpr, P: gl.constexpr
):  # fmt: skip
    """Consumer C: 64 rows of the job's product."""
    of_all, delta, product, bh, N, record, share = of_consumers
    lefts, rights, full, gathered, empty, begin, end, count = of_all
    F: gl.constexpr = P * D
    HALF: gl.constexpr = D // 2
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, F, 16])
    QUERIES: gl.constexpr = 1 if QUERY else 0
    job = gl.program_id(0)
    of_tokens = job < QUERIES + WEIGHTS  # whether left is x or g
    if QUERY:
        delta += bh.to(gl.int64) * N
        weights = _weights(delta, begin, count, job == 0)
    acc = gl.zeros((HALF, F), gl.float32, layout=wide)
    sums = gl.zeros((8, D), gl.float32, layout=_BY_ROW)
    for t in range(begin, end):
        stage = (t - begin) % _STAGES
        parity = (t - begin) // _STAGES & 1
        left, right = lefts.index(stage), rights.index(stage)
        mbarrier.wait(full.index(stage), parity)
        if of_tokens:
            mbarrier.wait(gathered.index(stage), parity)
            fence_async_shared()
        rows = left.slice(C * HALF, HALF, dim=1).permute((1, 0))
        acc = warpgroup_mma(rows, right, acc, is_async=True)
        acc = warpgroup_mma_wait(1, deps=[acc])
        mbarrier.arrive(empty.index((t - begin + _STAGES - 1) % _STAGES), count=1, pred=t > begin)
        if QUERY:
            ahead = _weights(delta, t + 1, count, job == 0)
        if job < QUERIES + 2 * WEIGHTS:
            own = right.slice(C * D, D, dim=1)
            for i in gl.static_range(0, _STEP, 8):
                values = own.slice(i, 8).load(_BY_ROW).to(gl.float32)
                sums += values * weights[i // 8][:, None] if QUERY else values
        if QUERY:
            weights = ahead
    acc = warpgroup_mma_wait(0, deps=[acc])

    row = C * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, wide))
    column = gl.arange(0, F, layout=gl.SliceLayout(0, wide))
    channel = gl.arange(0, D, layout=gl.SliceLayout(0, _BY_ROW))
    product += gl.program_id(1).to(gl.int64) * share + bh.to(gl.int64) * record
    of_sums = product + D * (QUERY + (1 + P) * WEIGHTS) * F
    gl.store(product + ((job * D + row) * F)[:, None] + column[None, :], acc)
    if job < QUERIES + 2 * WEIGHTS:
        gl.store(of_sums + job * F + C * D + channel, gl.sum(sums, 0))


@gluon.jit
def _weights(delta, t, count, weighted):
    """A step's weights in the sums, 8 rows at a time: those of the tokens (0 past the last), or else 1."""
    weights = ()
    for i in gl.static_range(0, _STEP, 8):
        token = t * _STEP + i + gl.arange(0, 8, layout=gl.SliceLayout(1, _BY_ROW))
        weights += (gl.load(delta + token, mask=weighted & (token < count), other=gl.where(weighted, 0.0, 1.0)),)
    return weights
