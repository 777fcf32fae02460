# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
"""S and z of Eq. 5 as `ops.triton.state` has them, with warps specialized. Head dim 128, degree 2.

Work comes in units: 128 linear tokens of one batch entry and head. The programs of a power p split all units evenly,
each a contiguous run of them, which may cross from one head to the next. The weights of (head, p) stay in shared
memory. Two consumers, groups of four warps, take 64 tokens of a unit each through φ_p, with tokens along the rows: the
hidden layer goes by in chunks of 64, which become the left operand of the second layer in registers. Only the features
go through shared memory (64 tokens × 128). S and z are shared out by feature: each consumer holds 64 of their 128 rows
and adds to them both consumers' features times v and times 1 (z: eight equal columns). It does so when its second layer
is through, beside its own last activation: consumer 0 adds both consumers' features of the unit before, consumer
1 its own of the unit before and consumer 0's of this one. So consumer 1 stays about half a unit behind, and one's
activations run beside the other's products. A producer of four warps gathers k and v.

Barriers; phase k of one has parity k & 1. Those of tokens have one phase a unit:

k_full[c], v_full[c]    consumer c's 64 keys (values) have landed: 128 arrivals, one by each thread of the producer.
                        They are copied by generic writes: who waits fences before a product reads them.
k_empty[c]              consumer c's hidden layer has read its keys.
v_empty[c], f_empty[c]  v: both consumers' products have read consumer c's values, 2 arrivals. f: the other consumer's
                        product has read consumer c's features (the own one is waited for before they are replaced).
f_full[c]               consumer c's features have been stored, and fenced.
w_full[j], w_empty      chunk j of both layers' weights has landed; both consumers are through with all. A phase a head.
"""

from functools import cache

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..activations import silu_of_half, squareplus_of_half
from ..plan import RELEASE, cdiv
from ..tiles import linear_tokens
from .parts import GROUP_TOKENS, MATRIX, barriers, copy_in, copy_rows, opaque_zero, row_vector

_MATRIX = gl.constexpr(MATRIX)
_ROWS = gl.constexpr(GROUP_TOKENS)
_K, _V, _F = gl.constexpr(0), gl.constexpr(2), gl.constexpr(4)
"""Tiles of 64 tokens in shared memory; + c for consumer c."""

_REGISTERS, _PRODUCER_REGISTERS = gl.constexpr(232), gl.constexpr(40)
"""Of the threads of a consumer, and of the producer."""

_AGAIN = gl.constexpr(RELEASE >= (3, 8))
"""Whether the place of the biases is found again at the end of a unit: with this release nothing is spilled then."""


def split_units(count: int, heads: int, degree: int, processors: int) -> tuple[int, int, int]:
    """Units of a head, programs per power, and the most programs that share a head."""
    units = cdiv(count, 2 * GROUP_TOKENS)
    programs = max(1, min(processors // degree, heads * units))
    return units, programs, _shares(heads, units, programs)


@cache
def _shares(heads: int, units: int, programs: int) -> int:
    """Most programs that share a head, if they split all units evenly."""
    total = heads * units
    return max(
        ((bh + 1) * units * programs - 1) // total - ((bh * units + 1) * programs - 1) // total + 1
        for bh in range(heads)
    )


@gluon.jit(do_not_specialize=[
    "count", "H", "heads", "units", "shares", "stride_kb", "stride_kn", "stride_kh", "stride_vb", "stride_vn",
    "stride_vh", "stride_table",
])  # fmt: skip
def specialized_state_kernel(
    k, v, w1, w2, biases, table, state, count, H, heads, units, shares,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_table,
    RATE: gl.constexpr, TABLE: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """Shares of S̄ and z̄, as those of `state_kernel`, with the weights and biases of `prepare_kernel`.

    Grid: programs · P. `heads` are b · h, `units` those of one head. Descriptors: w1 (h·D × P·D) in blocks of 128 × 64,
    w2 (h·P·D × P·D) of 64 × 128. Strides are in 8 elements (16 bytes), but that of the table in one.
    """
    gl.static_assert((D == 128) & (P == 2))
    dtype: gl.constexpr = k.dtype.element_ty
    w1_smem = gl.allocate_shared_memory(dtype, [P * D // 64, D, 64], _MATRIX)
    w2_smem = gl.allocate_shared_memory(dtype, [P * D // 64, 64, D], _MATRIX)
    tokens = gl.allocate_shared_memory(dtype, [6, _ROWS, D], _MATRIX)
    ones = gl.allocate_shared_memory(dtype, [1, 8, _ROWS], _MATRIX)
    ones.index(0).store(gl.full([8, _ROWS], 1.0, dtype, layout=gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])))
    w_full, w_empty = barriers(P * D // 64, 1), barriers(1, 2)
    k_full, k_empty = barriers(2, 128), barriers(2, 1)
    v_full, v_empty = barriers(2, 128), barriers(2, 2)
    f_full, f_empty = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    of_consumers = (
        biases, state, count, H, heads, units, shares, w1_smem, w2_smem, tokens, ones,
        w_full, w_empty, k_full, k_empty, v_full, v_empty, f_full, f_empty,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (of_consumers, 0, P, RATE)),
            (_consume, (of_consumers, 1, P, RATE)),
            (_produce, (
                k, v, w1, w2, table, count, H, heads, units,
                stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_table,
                w1_smem, w2_smem, tokens, w_full, w_empty, k_full, k_empty, v_full, v_empty, P, RATE, TABLE,
            )),
        ],
        [4, 4],
        [_REGISTERS, _PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _gather(
    x, slot, full, empty, parity, unit, c, units, count, H, stride_b, stride_n, stride_h, table, stride_table,
    RATE: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """Consumer c's rows of a unit into `slot`, once it is empty: zeros past the last linear token.

    Strides are in units of 8 elements: every row then begins at a multiple of 16 bytes, and the compiler knows.
    """
    PIECE: gl.constexpr = 32  # rows at a time, so that their addresses find registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    bh = unit // units
    b = bh // H
    h = bh - b * H
    if TABLE:
        table += h * stride_table
    first = (unit - bh * units) * (2 * _ROWS) + c * _ROWS
    channels = gl.arange(0, slot.shape[1], layout=gl.SliceLayout(0, layout))
    x += (b.to(gl.int64) * stride_b + h.to(gl.int64) * stride_h) * 8
    mbarrier.wait(empty, parity)
    for i in gl.static_range(0, _ROWS, PIECE):
        token = first + i + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        mask = token < count
        rows = linear_tokens(token, mask, table, RATE, TABLE)
        copy_rows(slot.slice(i, PIECE), x + (rows * stride_n * 8)[:, None] + channels[None, :], mask=mask[:, None])
    async_copy.mbarrier_arrive(full, increment_count=False)


@gluon.jit
def _produce(
    k, v, w1, w2, table, count, H, heads, units,
    stride_kb, stride_kn, stride_kh, stride_vb, stride_vn, stride_vh, stride_table,
    w1_smem, w2_smem, tokens, w_full, w_empty, k_full, k_empty, v_full, v_empty,
    P: gl.constexpr, RATE: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """Gathers in the order in which slots become free: keys of the next unit, values of this, consumer by consumer."""
    CHUNKS: gl.constexpr = w1_smem.shape[0]
    D: gl.constexpr = w1_smem.shape[1]
    CHUNK: gl.constexpr = w1_smem.shape[2]
    p = gl.program_id(0) % P
    first, last = _run(heads, units, gl.program_id(0) // P, gl.num_programs(0) // P)
    turn = first * 0  # parity of the heads so far
    for unit in range(first - 1, last):  # from one before the first, whose keys are the next
        parity = (unit - first) & 1
        bh = unit // units
        if unit == first or (unit > first and unit == bh * units):
            mbarrier.wait(w_empty.index(0), turn ^ 1)
            head = bh % H
            for j in gl.static_range(CHUNKS):
                bar = w_full.index(j)
                mbarrier.expect(bar, 2 * CHUNK * D * 2)
                copy_in(w1, [head * D, j * CHUNK], bar, w1_smem.index(j))
                copy_in(w2, [head * P * D + j * CHUNK, p * D], bar, w2_smem.index(j))
            turn ^= 1
        for c in range(2):
            if unit + 1 < last:
                _gather(
                    k, tokens.index(_K + c), k_full.index(c), k_empty.index(c), parity, unit + 1, c,
                    units, count, H, stride_kb, stride_kn, stride_kh, table, stride_table, RATE, TABLE,
                )  # fmt: skip
            if unit >= first:
                _gather(
                    v, tokens.index(_V + c), v_full.index(c), v_empty.index(c), parity ^ 1, unit, c,
                    units, count, H, stride_vb, stride_vn, stride_vh, table, stride_table, RATE, TABLE,
                )  # fmt: skip


@gluon.jit
def _square(x):
    """x², behind a branch if there is one: ptxas would make of it a predicate and its copy for every element."""
    return gl.inline_asm_elementwise("mul.f32 $0, $1, $1;", "=f,f", [x], dtype=gl.float32, is_pure=False, pack=1)


@gluon.jit
def _add_features(tokens, ones, s, z, zero, WHOSE: gl.constexpr, C: gl.constexpr, use_acc):
    """s += f[:, 64·C …]ᵀ v of consumer WHOSE's tokens, and each column of z += f[:, 64·C …]ᵀ 1, both left in flight."""
    f = tokens.index(_F + WHOSE + zero).slice(C * _ROWS, _ROWS, dim=1).permute((1, 0))
    s = warpgroup_mma(f, tokens.index(_V + WHOSE + zero), s, use_acc=use_acc, is_async=True)
    z = warpgroup_mma(f, ones.index(zero).permute((1, 0)), z, use_acc=use_acc, is_async=True)
    return s, z


@gluon.jit
def _run(heads, units, program, programs):
    """First unit of a program, and the one after its last. All counts of units, times the programs, are 32-bit."""
    total = heads * units
    return program * total // programs, (program + 1) * total // programs


@gluon.jit
def _consume(of_consumers, C: gl.constexpr, P: gl.constexpr, RATE: gl.constexpr):
    """Consumer C: 64 of each unit's tokens, and features 64·C … of S_p."""
    (
        biases, state, count, H, heads, units, shares, w1_smem, w2_smem, tokens, ones,
        w_full, w_empty, k_full, k_empty, v_full, v_empty, f_full, f_empty,
    ) = of_consumers  # fmt: skip
    CHUNKS: gl.constexpr = w1_smem.shape[0]
    D: gl.constexpr = w1_smem.shape[1]
    CHUNK: gl.constexpr = w1_smem.shape[2]
    F: gl.constexpr = P * D
    dtype: gl.constexpr = tokens.dtype
    hidden: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, CHUNK, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=wide, k_width=2)
    across_hidden: gl.constexpr = gl.SliceLayout(0, hidden)
    across: gl.constexpr = gl.SliceLayout(0, wide)
    down: gl.constexpr = gl.SliceLayout(1, wide)
    narrow: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 8, 16])
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])

    p = gl.program_id(0) % P
    first, last = _run(heads, units, gl.program_id(0) // P, gl.num_programs(0) // P)
    turn = first * 0  # parity of the heads so far
    parity = first * 0  # of the units so far
    for bh in range(first // units, (last - 1) // units + 1):
        start, stop = _run(heads, units, gl.program_id(0) // P + opaque_zero(bh), gl.num_programs(0) // P)
        begin = gl.maximum(start - bh * units, 0)
        end = gl.minimum(stop - bh * units, units)
        h = bh % H
        s = gl.zeros((_ROWS, D), gl.float32, layout=wide)
        z = gl.zeros((_ROWS, 8), gl.float32, layout=narrow)
        second = (H + h) * F + p * D
        bias = row_vector(biases, h * F, CHUNK, across_hidden)
        second_bias = row_vector(biases, second, D, across)
        for unit in range(begin, end):
            zero = opaque_zero(unit)
            going = unit > begin
            x = tokens.index(_K + C + zero)

            # first layer, first chunk. The biases are where the products start from: broadcast here, and added to zeros
            # in the chunks below, where ptxas would otherwise have every product wait for the one before.
            ahead = bias.broadcast_to([_ROWS, CHUNK])
            mbarrier.wait(w_full.index(0), turn)
            mbarrier.wait(k_full.index(C), parity)
            fence_async_shared()
            ahead = warpgroup_mma(x, w1_smem.index(zero), ahead, is_async=True)
            u = second_bias.broadcast_to([_ROWS, D])
            a = gl.zeros((_ROWS, CHUNK), dtype, layout=left)
            x1 = warpgroup_mma_wait(0, deps=[ahead])

            # both layers, chunk by chunk. In flight: the second layer's product of a chunk, while the first
            # layer's of the next is activated.
            for j in gl.static_range(CHUNKS):
                before = a
                if j + 1 < CHUNKS:
                    bias = row_vector(biases, h * F + (j + 1) * CHUNK + 8 * zero, CHUNK, across_hidden)
                a = gl.convert_layout(silu_of_half(x1, True).to(dtype), left)
                if j + 1 < CHUNKS:
                    mbarrier.wait(w_full.index(j + 1), turn)
                if j > 0:
                    u, before = warpgroup_mma_wait(0, deps=[u, before])
                if j + 1 < CHUNKS:
                    ahead = gl.zeros((_ROWS, CHUNK), gl.float32, layout=hidden) + bias
                    ahead = warpgroup_mma(x, w1_smem.index(j + 1 + zero), ahead, is_async=True)
                u = warpgroup_mma(a, w2_smem.index(j + zero), u, is_async=True)
                if j + 1 < CHUNKS:
                    x1 = warpgroup_mma_wait(1, deps=[ahead])
                if j + 2 == CHUNKS:
                    mbarrier.arrive(k_empty.index(C), count=1)

            # what there is to add to s: features of the last unit, for consumer 1 the other's of this one. In a
            # head's first unit only the latter exist: products of whatever else is there, NaN or half a tile, go into s
            # before it starts from 0 (use_acc).
            mbarrier.wait(v_full.index(C), parity ^ 1, pred=going)
            if C == 0:
                mbarrier.wait(f_full.index(1), parity ^ 1, pred=going)
                mbarrier.wait(v_full.index(1), parity ^ 1, pred=going)
            else:
                mbarrier.wait(f_full.index(0), parity)
                mbarrier.wait(v_full.index(0), parity)
            fence_async_shared()
            s, z = _add_features(tokens, ones, s, z, zero, C, C, unit > begin + 1 if C == 0 else True)
            s, z = _add_features(tokens, ones, s, z, zero, 1 - C, C, going if C == 1 else True)

            # the last activation
            u, a = warpgroup_mma_wait(4, deps=[u, a])
            f = squareplus_of_half(u, RATE == 0)
            if p > 0:
                f = _square(f)
            features = f.to(dtype)
            s, z = warpgroup_mma_wait(0, deps=[s, z])
            mbarrier.arrive(v_empty.index(C), count=1, pred=going)
            mbarrier.arrive(v_empty.index(1 - C), count=1, pred=going if C == 0 else True)
            mbarrier.arrive(f_empty.index(1 - C), count=1, pred=going if C == 0 else True)

            mbarrier.wait(f_empty.index(C), parity ^ 1)
            slot = tokens.index(_F + C + zero)
            slot.store(features)
            start = unit * (2 * _ROWS) + C * _ROWS
            if start + _ROWS > count:  # keys past the last token are zero; their features are not
                row = start + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, by_row))
                slot.store(gl.where((row < count)[:, None], slot.load(by_row), 0.0))
            fence_async_shared()
            mbarrier.arrive(f_full.index(C), count=1)
            # The next unit's first biases are on their way.
            first_layer, second_layer = h * F + 8 * zero, second + 8 * zero
            if _AGAIN:
                again = (bh + zero) % H
                first_layer, second_layer = again * F, (H + again) * F + (gl.program_id(0) + zero) % P * D
            bias = row_vector(biases, first_layer, CHUNK, across_hidden)
            second_bias = row_vector(biases, second_layer, D, across)
            parity ^= 1

        # what is left to add.
        mbarrier.wait(v_full.index(C), parity ^ 1)
        if C == 0:
            mbarrier.wait(f_full.index(1), parity ^ 1)
            mbarrier.wait(v_full.index(1), parity ^ 1)
        fence_async_shared()
        s, z = _add_features(tokens, ones, s, z, 0, C, C, end > begin + 1 if C == 0 else True)
        if C == 0:
            s, z = _add_features(tokens, ones, s, z, 0, 1, C, True)
        s, z = warpgroup_mma_wait(0, deps=[s, z])
        mbarrier.arrive(v_empty.index(C), count=1)
        if C == 0:
            mbarrier.arrive(v_empty.index(1), count=1)
            mbarrier.arrive(f_empty.index(1), count=1)
        mbarrier.arrive(w_empty.index(0), count=1)
        turn ^= 1

        # this program's share of the sums. Who has the head's last unit also fills the shares that nobody has. What the
        # units do not need is found again here (`late` is 0), so that it takes no registers of theirs.
        late = opaque_zero(bh)
        share = gl.program_id(0) // P + late - ((bh * units + 1) * (gl.num_programs(0) // P) - 1) // (heads * units)
        _, end = _run(heads, units, gl.program_id(0) // P + late, gl.num_programs(0) // P)
        stop = gl.where(end >= (bh + 1) * units, shares, share + 1)
        first_feature = (gl.program_id(0) + late) % P * D + C * _ROWS
        feature = first_feature + gl.arange(0, _ROWS, layout=down)
        feature_of_z = first_feature + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, narrow))
        channel = gl.arange(0, D, layout=across)
        s = s * (1.0 / (count + late))
        sums = gl.sum(z, 1) * (0.125 / (count + late))  # of eight equal columns
        stacked = heads + opaque_zero(bh)
        for i in range(share, stop):
            record = state + (i * stacked + bh).to(gl.int64) * (F * (D + 1))
            gl.store(record + (feature * D)[:, None] + channel[None, :], s)
            gl.store(record + F * D + feature_of_z, sums)
            s = s * 0.0
            sums = sums * 0.0
