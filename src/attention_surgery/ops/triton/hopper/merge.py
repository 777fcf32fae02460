# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
"""The end of Eq. 5 as `ops.triton.merge` has it, with warps specialized. Head dim 128, degree 2.

One program per multiprocessor goes through a contiguous run of tiles: 128 tokens of one batch entry and head. A
producer warp streams matrices through shared memory; two consumers, groups of four warps with 64 tokens each, share
them.

Barriers; phase k of one has parity k & 1. "full" counts one arrival (the producer's, with the bytes), "empty" both
consumers'.

w1_full[j], w1_empty[j]  chunk j (128 × 64) of W1, which stays as long as the head does.
full[s], empty[s]        stage s of a ring of three: W2's rows 64j … (64 × 256) for j = 0 … 3, then S̄'s two halves
                         (128 × 128). Six uses a tile, two of each stage: use u is in stage u % 3, of parity u // 3.
x_full[c], o_full[c]     consumer c's own tiles of q and o, which it asks for itself; y leaves from where o was.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..activations import silu_of_half, squareplus_of_half
from .parts import MATRIX, TOKENS, barriers, copy_in, copy_out, opaque_zero, pin, row_vector, view

_MATRIX = gl.constexpr(MATRIX)
_TOKENS = gl.constexpr(TOKENS)
_STAGES = gl.constexpr(3)
_REGISTERS = gl.constexpr(240)
"""Of a consumer's threads; those of the first keep 256, the producer's have 24."""


@gluon.jit(do_not_specialize=["N", "H", "tiles", "total"])
def specialized_merge_kernel(
    q, o, y, softmax_mass, w1, w2, biases, state, mass, denominator, N, H, tiles, total, ratio, stride_qh, stride_oh,
    D: gl.constexpr, F: gl.constexpr, SOFTMAX: gl.constexpr,
):  # fmt: skip
    """y and its denominator. Without SOFTMAX ("linear") m is 0; without `softmax_mass` (b h n) it is 1.

    `total` tiles, `tiles` of each batch entry and head. Descriptors: q, o, y in blocks of 64 tokens, w1 (h·D × F) of
    128 × 64, w2 (h·F × F) of 64 × 256, state (b·h·F × D) of 128 × 128. φ's parameters are halved, b1 and b2 are
    `biases` (2 h F). `mass` is float32.
    """
    gl.static_assert((D == 128) & (F == 256))
    program = gl.program_id(0).to(gl.int64)
    programs = gl.num_programs(0)
    first = (program * total // programs).to(gl.int32)
    last = ((program + 1) * total // programs).to(gl.int32)

    w1_smem = gl.allocate_shared_memory(q.dtype, [F // 64, D, 64], _MATRIX)
    ring = gl.allocate_shared_memory(q.dtype, [_STAGES, 64, F], _MATRIX)
    slots = gl.allocate_shared_memory(q.dtype, [4, 1, 64, D], _TOKENS)  # q of both consumers, o and y of both
    w1_full, w1_empty = barriers(F // 64, 1), barriers(F // 64, 2)
    full, empty = barriers(_STAGES, 1), barriers(_STAGES, 2)
    x_full, o_full = barriers(2, 1), barriers(2, 1)
    fence_async_shared()
    of_consumers = (
        q, o, y, softmax_mass, mass, biases, denominator, N, H, ratio, stride_qh, stride_oh,
        w1_smem, ring, slots, w1_full, w1_empty, full, empty, x_full, o_full, first, last, tiles,
    )  # fmt: skip
    gl.warp_specialize(
        [
            (_consume, (of_consumers, 0, D, F, SOFTMAX)),
            (_consume, (of_consumers, 1, D, F, SOFTMAX)),
            (_produce, (w1, w2, state, w1_smem, ring, w1_full, w1_empty, full, empty, first, last, tiles, H, D, F)),
        ],
        [4, 1],
        [_REGISTERS, 24],
    )


@gluon.jit
def _produce(
    w1, w2, state, w1_smem, ring, w1_full, w1_empty, full, empty, first, last, tiles, H,
    D: gl.constexpr, F: gl.constexpr,
):  # fmt: skip
    """Brings matrices in the order in which the consumers take them: W1 is one chunk ahead."""
    chunks: gl.constexpr = F // 64
    heads = first * 0  # that W1 was loaded for
    previous = first * 0 - 1
    for t in range(first, last):
        bh = t // tiles
        head = bh % H
        fresh = bh != previous
        previous = bh
        _load_w1(w1, w1_smem, w1_full, w1_empty, 0, head, heads, fresh, D)
        for u in gl.static_range(2 * _STAGES):
            if u + 1 < chunks:
                _load_w1(w1, w1_smem, w1_full, w1_empty, u + 1, head, heads, fresh, D)
            place, bar = ring.index(u % _STAGES), full.index(u % _STAGES)
            mbarrier.wait(empty.index(u % _STAGES), (u // _STAGES) ^ 1)
            mbarrier.expect(bar, 64 * F * 2)
            if u < chunks:
                copy_in(w2, [head * F + u * 64, 0], bar, place)
            else:
                copy_in(state, [bh * F + (u - chunks) * 128, 0], bar, view(place, [128, 128], _MATRIX))
        heads += fresh.to(gl.int32)


@gluon.jit
def _load_w1(w1, w1_smem, w1_full, w1_empty, j: gl.constexpr, head, heads, fresh, D: gl.constexpr):
    mbarrier.wait(w1_empty.index(j), (heads & 1) ^ 1, pred=fresh)
    mbarrier.expect(w1_full.index(j), D * 64 * 2, pred=fresh)
    copy_in(w1, [head * D, j * 64], w1_full.index(j), w1_smem.index(j), pred=fresh)


@gluon.jit
def _load_tokens(x, slot, bar, b, start, h, stride_h, pred):
    mbarrier.expect(bar, 64 * 128 * 2, pred=pred)
    copy_in(x, [b, start, h * stride_h], bar, slot, pred=pred)


@gluon.jit
def _consume(of_consumers, C: gl.constexpr, D: gl.constexpr, F: gl.constexpr, SOFTMAX: gl.constexpr):
    """Consumer C: 64 of each tile's tokens."""
    (
        q, o, y, softmax_mass, mass, biases, denominator, N, H, ratio, stride_qh, stride_oh,
        w1_smem, ring, slots, w1_full, w1_empty, full, empty, x_full, o_full, first, last, tiles,
    ) = of_consumers  # fmt: skip
    chunks: gl.constexpr = F // 64
    dtype: gl.constexpr = q.dtype
    hidden: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    wide: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=wide, k_width=2)
    across_hidden: gl.constexpr = gl.SliceLayout(0, hidden)
    across: gl.constexpr = gl.SliceLayout(0, wide)
    down: gl.constexpr = gl.SliceLayout(1, wide)
    x_slot = slots.index(C)
    o_slot = slots.index(C + 2)
    o_rows = view(o_slot, [64, D], _MATRIX)
    x_bar = x_full.index(C)
    o_bar = o_full.index(C)

    bh = first // tiles
    tile = first - bh * tiles
    b = bh // H
    h = bh - b * H
    _load_tokens(q, x_slot, x_bar, b, tile * 128 + C * 64, h, stride_qh, True)
    bias = row_vector(biases, h * F, 64, across_hidden)
    bias0 = row_vector(biases, (H + h) * F, 128, across)
    bias1 = row_vector(biases, (H + h) * F + 128, 128, across)
    heads = first * 0  # that W1 was read for
    for t in range(first, last):
        start = tile * 128 + C * 64
        parity = (t - first) & 1
        wraps = tile + 1 == tiles  # W1 then makes room for another head's
        zero = opaque_zero(t)

        # The two layers, up to the last activation. Products start from the biases.
        x = view(slots.index(C + zero), [64, D], _MATRIX)
        mbarrier.wait(x_bar, parity)
        mbarrier.wait(w1_full.index(0), heads & 1)
        ahead = gl.zeros((64, 64), gl.float32, layout=hidden) + bias
        ahead = warpgroup_mma(x, w1_smem.index(zero), ahead, is_async=True)
        u0 = gl.zeros((64, 128), gl.float32, layout=wide) + bias0
        u1 = gl.zeros((64, 128), gl.float32, layout=wide) + bias1
        a = gl.zeros((64, 64), dtype, layout=left)
        x1 = warpgroup_mma_wait(0, deps=[ahead])
        mbarrier.arrive(w1_empty.index(0), count=1, pred=wraps)
        if SOFTMAX:
            tma.store_wait(0)  # the last tile's y has left the slot
            _load_tokens(o, o_slot, o_bar, b, start, h, stride_oh, True)
        for j in gl.static_range(chunks):
            # In flight here: the second layer's products of chunk j - 1, during the activation of chunk j.
            if j + 1 < chunks:
                bias = row_vector(biases, h * F + (j + 1) * 64, 64, across_hidden)
            before = a
            # Two numbers at a time: one at a time, registers are spilled.
            a = pin(gl.convert_layout(silu_of_half(x1, False).to(dtype), left))
            mbarrier.wait(full.index(j % _STAGES), j // _STAGES)
            if j + 1 < chunks:
                mbarrier.wait(w1_full.index(j + 1), heads & 1)
                ahead = gl.zeros((64, 64), gl.float32, layout=hidden) + bias
            # No product may be under way behind this: left in flight any longer, ptxas finds too few registers and has
            # every product wait for the one before.
            if j > 0:
                u0, u1, before = warpgroup_mma_wait(0, deps=[u0, u1, before])
            if j + 1 < chunks:
                ahead = warpgroup_mma(x, w1_smem.index(j + 1 + zero), ahead, is_async=True)
            u0 = warpgroup_mma(a, _w2_half(ring, j % _STAGES + zero, 0), u0, is_async=True)
            u1 = warpgroup_mma(a, _w2_half(ring, j % _STAGES + zero, 1), u1, is_async=True)
            if j > 0:
                mbarrier.arrive(empty.index((j - 1) % _STAGES), count=1)
            if j + 1 < chunks:
                x1 = warpgroup_mma_wait(2, deps=[ahead])
                mbarrier.arrive(w1_empty.index(j + 1), count=1, pred=wraps)

        # x has been read: the next one may come.
        next_tile = gl.where(wraps, 0, tile + 1)
        next_h = h + wraps.to(gl.int32)
        next_b = b + (next_h == H).to(gl.int32)
        next_h = gl.where(next_h == H, 0, next_h)
        _load_tokens(q, x_slot, x_bar, next_b, next_tile * 128 + C * 64, next_h, stride_qh, t + 1 < last)

        # The last activation and the state, one power after the other.
        s0: gl.constexpr = chunks % _STAGES
        s1: gl.constexpr = (chunks + 1) % _STAGES
        u0 = warpgroup_mma_wait(1, deps=[u0])
        f = squareplus_of_half(u0, not SOFTMAX)
        weight = gl.sum(f * row_vector(mass, bh * F, 128, across), 1)
        f0 = gl.convert_layout(f.to(dtype), left)
        mbarrier.wait(full.index(s0), chunks // _STAGES)
        u1, a = warpgroup_mma_wait(0, deps=[u1, a])
        mbarrier.arrive(empty.index((chunks - 1) % _STAGES), count=1)
        numerator = gl.zeros((64, 128), gl.float32, layout=wide)
        numerator = warpgroup_mma(
            f0, view(ring.index(s0 + zero), [128, 128], _MATRIX), numerator, use_acc=False, is_async=True
        )
        f = squareplus_of_half(u1, not SOFTMAX)
        f = f * f
        weight += gl.sum(f * row_vector(mass, bh * F + 128, 128, across), 1)
        f1 = gl.convert_layout(f.to(dtype), left)
        mbarrier.wait(full.index(s1), (chunks + 1) // _STAGES)
        numerator, f0 = warpgroup_mma_wait(0, deps=[numerator, f0])
        mbarrier.arrive(empty.index(s0), count=1)
        numerator = warpgroup_mma(f1, view(ring.index(s1 + zero), [128, 128], _MATRIX), numerator, is_async=True)

        # The merge. The next tile's first biases are on their way.
        bias = row_vector(biases, next_h * F, 64, across_hidden)
        bias0 = row_vector(biases, (H + next_h) * F, 128, across)
        bias1 = row_vector(biases, (H + next_h) * F + 128, 128, across)
        rows = start + gl.arange(0, 64, layout=down)
        vector = bh.to(gl.int64) * N + rows
        weight = weight * ratio
        if SOFTMAX:
            if softmax_mass is None:
                weight += 1.0
            else:
                m = gl.load(softmax_mass + vector, mask=rows < N, other=1.0)
                weight += m
        gl.store(denominator + vector, weight, mask=rows < N)
        inverse = 1.0 / weight
        numerator, f1 = warpgroup_mma_wait(0, deps=[numerator, f1])
        mbarrier.arrive(empty.index(s1), count=1)
        result = numerator * (ratio * inverse)[:, None]
        if SOFTMAX:
            mbarrier.wait(o_bar, parity)
            o_tile = o_rows.load(wide).to(gl.float32)
            if softmax_mass is None:
                result += o_tile * inverse[:, None]
            else:
                result += o_tile * (m * inverse)[:, None]
        else:
            tma.store_wait(0)
        o_rows.store(result.to(dtype))
        fence_async_shared()
        copy_out(y, [b, start, h * D], o_slot)

        heads += wraps.to(gl.int32)
        bh += wraps.to(gl.int32)
        tile = next_tile
        b = next_b
        h = next_h
    tma.store_wait(0)


@gluon.jit
def _w2_half(ring, stage, i: gl.constexpr):
    """Columns 128·i … of the 64 × 256 in a stage: its column blocks of 64 lie one behind the other."""
    return view(ring.index(stage), [2, 64, 128], _MATRIX).index(i)
