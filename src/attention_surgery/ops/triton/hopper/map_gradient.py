# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false
# pyright: reportAttributeAccessIssue=false
"""The gradient of φ's input as `ops.triton.map_gradients` has it, with warps specialized. Head dim 128, degree 2.

One program per multiprocessor goes through a contiguous run of tiles: 128 tokens of one batch entry and head. A
consumer of eight warps takes them through both layers and back, with the matrices that a producer of four warps streams
through shared memory; the producer also gathers the tokens of x and g. Chunks of both layers go by in loops, and one
consumer has all tokens, for the sake of the code's length: what the instruction cache has no room for takes twice the
time (docs/log.md).

A tile takes 28 blocks of 16 KB through a ring of seven stages: use u is of stage u % 7 and of parity u // 7 & 1, in
every tile. For each chunk of 64 hidden units W1's columns (128 × 64) and W2's rows (64 × 256, in two blocks); then S's
rows, 64 at a time; then for each chunk, backwards, W2's rows and W1's columns once more.

Barriers; phase k of one has parity k & 1, and those of tokens have one phase a tile:

full[s], empty[s]  stage s has landed: one arrival, with the bytes; it has been read: one arrival.
token_full[i]      all 128 tokens of x (0) or g (1) have landed: 128 arrivals, one by each thread of the producer. They
                   are copied by generic writes: who waits fences before a product reads them.
token_empty[i]     they have been read. x and g of a tile take two slots, which change places with every tile: g makes
                   room for the next x, and x, at the end, for the next g.
"""

from triton import constexpr_function
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..activations import power, silu_grad_of_half, silu_of_half, squareplus_of_half_and_slope
from ..tiles import linear_tokens
from .parts import (
    GROUP_TOKENS,
    MATRIX,
    TOKENS,
    barriers,
    copy_in,
    copy_out,
    copy_rows,
    opaque_zero,
    pin,
    row_vector,
    view,
)

_MATRIX = gl.constexpr(MATRIX)
_TOKENS = gl.constexpr(TOKENS)
_ROWS = gl.constexpr(2 * GROUP_TOKENS)
_CHUNK = gl.constexpr(64)
"""Hidden units, or features, at a time."""
_STAGES = gl.constexpr(7)
_PRODUCER_REGISTERS = gl.constexpr(24)
"""Of a thread; 240 are left for one of the consumer."""
_X, _G = gl.constexpr(0), gl.constexpr(1)
_HIDDEN = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, GROUP_TOKENS, 16])
)
_WIDE = gl.constexpr(
    gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[8, 1], instr_shape=[16, 2 * GROUP_TOKENS, 16])
)
"""Products of 64 and of 128 columns."""


@gluon.jit(do_not_specialize=[
    "count", "N", "H", "first", "tiles", "total", "stride_xb", "stride_xn", "stride_xh", "stride_gb", "stride_gn",
    "stride_gh", "stride_table",
])  # fmt: skip
def specialized_map_gradient_kernel(
    x, g, delta, state, mass, w1, w2, biases, table, added, dx, dv, work, scratch,
    count, padded, N, H, first, tiles, total,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    QUERY: gl.constexpr, RATE: gl.constexpr, TABLE: gl.constexpr, WEIGHTS: gl.constexpr, RELATIVE: gl.constexpr,
    WORK: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """What `map_gradient_kernel` does, and on the key side `value_gradient_kernel`. Grid: programs.

    `total` tiles, `tiles` of each batch entry and head, from head `first` on; `padded` tokens are 128 · `tiles`. φ's
    parameters are halved, b1 and b2 are `biases` (2 h F). Descriptors: w1 (h·D × F) in blocks of 128 × 64, w2 (h·F × F)
    and state (b·h·F × D) of 64 × 128, work of 128 × 64; dx if QUERY, in blocks of 128 tokens. On the key side φ goes to
    `scratch`, the work space as a pointer, in an order of its own: there it serves dv alone. Strides of x and g are in
    units of 8 elements: rows begin at multiples of 16 bytes. RELATIVE is that of `activations.squareplus_of_half`.
    """
    gl.static_assert((D == 128) & (P == 2))
    dtype: gl.constexpr = x.dtype.element_ty
    program = gl.program_id(0).to(gl.int64)
    begin = first * tiles + (program * total // gl.num_programs(0)).to(gl.int32)
    end = first * tiles + ((program + 1) * total // gl.num_programs(0)).to(gl.int32)
    if scratch is not None:
        scratch -= first * padded.to(gl.int64) * WORK
    ring = gl.allocate_shared_memory(dtype, [_STAGES, _CHUNK, D], _MATRIX)
    tokens = gl.allocate_shared_memory(dtype, [2, _ROWS, D], _MATRIX)
    staged = gl.allocate_shared_memory(dtype, [1, 1, _ROWS, D], _TOKENS)
    full, empty = barriers(_STAGES, 1), barriers(_STAGES, 1)
    token_full, token_empty = barriers(2, 128), barriers(2, 1)
    fence_async_shared()
    of_all = (ring, tokens, full, empty, token_full, token_empty, begin, end, table, count, N, H, tiles)
    of_consumer = (of_all, staged, delta, mass, biases, added, dx, dv, work, scratch, first * tiles, stride_table)
    gl.warp_specialize(
        [
            (_consume, (of_consumer, QUERY, RATE, TABLE, WEIGHTS, RELATIVE, WORK, D, P)),
            (_produce, (
                of_all, x, g, state, w1, w2,
                stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table, RATE, TABLE, D, P,
            )),
        ],
        [4],
        [_PRODUCER_REGISTERS],
    )  # fmt: skip


@gluon.jit
def _produce(
    of_all, x, g, state, w1, w2,
    stride_xb, stride_xn, stride_xh, stride_gb, stride_gn, stride_gh, stride_table,
    RATE: gl.constexpr, TABLE: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    ring, _, full, empty, _, _, begin, end, _, _, _, H, tiles = of_all
    F: gl.constexpr = P * D
    CHUNKS: gl.constexpr = F // _CHUNK
    LAYER: gl.constexpr = (1 + P) * CHUNKS  # uses of a way through both layers
    BACK: gl.constexpr = LAYER + F // _CHUNK
    for t in range(begin, end):
        bh = t // tiles
        head = bh % H
        slot = t - begin & 1
        if t == begin:
            _gather(of_all, x, stride_xb, stride_xn, stride_xh, stride_table, t, _X, 0, RATE, TABLE)
        for u in gl.static_range(BACK + LAYER):
            place, bar = ring.index(u % _STAGES), full.index(u % _STAGES)
            mbarrier.wait(empty.index(u % _STAGES), (u // _STAGES & 1) ^ 1)
            mbarrier.expect(bar, D * _CHUNK * 2)
            if u < LAYER:
                if u % (1 + P) == 0:
                    copy_in(w1, [head * D, u // (1 + P) * _CHUNK], bar, view(place, [D, _CHUNK], _MATRIX))
                else:
                    copy_in(w2, [head * F + u // (1 + P) * _CHUNK, (u % (1 + P) - 1) * D], bar, place)
            elif u < BACK:
                copy_in(state, [bh * F + (u - LAYER) * _CHUNK, 0], bar, place)
            elif (u - BACK) % (1 + P) == P:
                copy_in(w1, [head * D, (u - BACK) // (1 + P) * _CHUNK], bar, view(place, [D, _CHUNK], _MATRIX))
            else:
                copy_in(w2, [head * F + (u - BACK) // (1 + P) * _CHUNK, (u - BACK) % (1 + P) * D], bar, place)
            # Tokens come where their slots are free already: behind what frees them by the ring's stages.
            if u == _STAGES:
                _gather(of_all, g, stride_gb, stride_gn, stride_gh, stride_table, t, _G, slot ^ 1, RATE, TABLE)
            if u == BACK + _STAGES:
                if t + 1 < end:
                    _gather(of_all, x, stride_xb, stride_xn, stride_xh, stride_table, t + 1, _X, slot ^ 1, RATE, TABLE)


@gluon.jit
def _gather(
    of_all, x, stride_b, stride_n, stride_h, stride_table, t, which: gl.constexpr, slot,
    RATE: gl.constexpr, TABLE: gl.constexpr,
):  # fmt: skip
    """Tile t's tokens of x or g (`which`) into a slot, once it is empty: zeros past the last linear token."""
    _, tokens, _, _, token_full, token_empty, begin, _, table, count, _, H, tiles = of_all
    PIECE: gl.constexpr = 8 if TABLE else 32  # rows at a time, so that their addresses find registers
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    bh = t // tiles
    b = bh // H
    h = bh - b * H
    if TABLE:
        table += h * stride_table
    start = (t - bh * tiles) * _ROWS
    channels = gl.arange(0, tokens.shape[2], layout=gl.SliceLayout(0, layout))
    zero = opaque_zero(t)  # extended to 64 bits here, the strides take no registers elsewhere
    x += (b.to(gl.int64) * (stride_b + zero) + h.to(gl.int64) * (stride_h + zero)) * 8
    # x takes the place of the last tile's g, and g that of its x.
    mbarrier.wait(token_empty.index(1 - which), (t - begin & 1) ^ 1)
    for i in gl.static_range(0, _ROWS, PIECE):
        first_row = start + i + (opaque_zero(t) if TABLE else 0)  # so that positions are looked up piece by piece
        token = first_row + gl.arange(0, PIECE, layout=gl.SliceLayout(1, layout))
        mask = token < count
        rows = linear_tokens(token, mask, table, RATE, TABLE)
        place = tokens.index(slot).slice(i, PIECE)
        copy_rows(place, x + (rows * stride_n * 8)[:, None] + channels[None, :], mask=mask[:, None])
    async_copy.mbarrier_arrive(token_full.index(which), increment_count=False)


@gluon.jit
def _consume(
    of_consumer, QUERY: gl.constexpr, RATE: gl.constexpr, TABLE: gl.constexpr, WEIGHTS: gl.constexpr,
    RELATIVE: gl.constexpr, WORK: gl.constexpr, D: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    of_all, staged, delta, mass, biases, added, dx, dv, work, scratch, before_first, stride_table = of_consumer
    ring, tokens, full, empty, token_full, token_empty, begin, end, table, count, N, H, tiles = of_all
    F: gl.constexpr = P * D
    CHUNKS: gl.constexpr = F // _CHUNK
    LAYER: gl.constexpr = (1 + P) * CHUNKS
    BACK: gl.constexpr = LAYER + F // _CHUNK
    dtype: gl.constexpr = ring.dtype
    left: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=_WIDE, k_width=2)
    across_hidden: gl.constexpr = gl.SliceLayout(0, _HIDDEN)
    across: gl.constexpr = gl.SliceLayout(0, _WIDE)
    bias = row_vector(biases, begin // tiles % H * F, _CHUNK, across_hidden)
    for t in range(begin, end):
        parity = t - begin & 1
        bh = t // tiles
        b = bh // H
        h = bh - b * H
        start = (t - bh * tiles) * _ROWS
        x_slot, g_slot = parity, parity ^ 1
        row = (t - before_first) * _ROWS

        # The two layers, up to the last activation. Products start from the biases.
        ahead = gl.zeros((_ROWS, _CHUNK), gl.float32, layout=_HIDDEN) + bias
        mbarrier.wait(token_full.index(_X), parity)
        mbarrier.wait(full.index(0), 0)
        fence_async_shared()
        ahead = warpgroup_mma(_tokens(tokens, x_slot, t), _w1_block(ring, 0, t), ahead, is_async=True)
        u0 = gl.zeros((_ROWS, D), gl.float32, layout=_WIDE) + row_vector(biases, (H + h) * F, D, across)
        u1 = gl.zeros((_ROWS, D), gl.float32, layout=_WIDE) + row_vector(biases, (H + h) * F + D, D, across)
        half = warpgroup_mma_wait(0, deps=[ahead])
        _free(empty, 0)
        for j in range(CHUNKS - 1 + opaque_zero(t)):
            bias = row_vector(biases, h * F + (j + 1) * _CHUNK, _CHUNK, across_hidden)
            activated = silu_of_half(half, True).to(dtype)
            if WEIGHTS:
                _store(staged, j % 2, work, activated, row, 2 * F + j * _CHUNK)
            else:
                activated = pin(activated)
            a = gl.convert_layout(activated, left)
            use = (1 + P) * j
            ahead = gl.zeros((_ROWS, _CHUNK), gl.float32, layout=_HIDDEN) + bias
            for k in gl.static_range(1 + P):
                _wait(full, use + k + 1)
            ahead = warpgroup_mma(_tokens(tokens, x_slot, t), _w1_block(ring, use + 3, t), ahead, is_async=True)
            u0 = warpgroup_mma(a, _block(ring, use + 1, t), u0, is_async=True)
            u1 = warpgroup_mma(a, _block(ring, use + 2, t), u1, is_async=True)
            half, u0, u1, a = warpgroup_mma_wait(0, deps=[ahead, u0, u1, a])
            for k in gl.static_range(1 + P):
                _free(empty, use + k + 1)
        activated = silu_of_half(half, True).to(dtype)
        if WEIGHTS:
            _store(staged, (CHUNKS - 1) % 2, work, activated, row, 2 * F + (CHUNKS - 1) * _CHUNK)
        else:
            activated = pin(activated)
        a = gl.convert_layout(activated, left)
        _wait(full, LAYER - 2)
        _wait(full, LAYER - 1)
        u0 = warpgroup_mma(a, _block(ring, LAYER - 2, t), u0, is_async=True)
        u1 = warpgroup_mma(a, _block(ring, LAYER - 1, t), u1, is_async=True)

        # dφ = g Sᵀ + c zᵀ and du, 64 features at a time; on the key side also dv = φ S.
        token = start + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _HIDDEN))
        if QUERY:
            c = -gl.load(delta + bh.to(gl.int64) * N + token, mask=token < count, other=0.0)
        else:
            c = gl.where(token < count, 1.0, 0.0)
        mbarrier.wait(token_full.index(_G), parity)
        _wait(full, LAYER)
        fence_async_shared()
        df = _contract(tokens, g_slot, ring, LAYER, t)
        u0, u1, a = warpgroup_mma_wait(1, deps=[u0, u1, a])
        _free(empty, LAYER - 2)
        _free(empty, LAYER - 1)
        u = _halves(u0) + _halves(u1)
        du = ()
        for i in gl.static_range(F // _CHUNK):
            if i > 0:
                _wait(full, LAYER + i)
                df = _contract(tokens, g_slot, ring, LAYER + i, t)
            z = row_vector(mass, bh * F + i * _CHUNK, _CHUNK, across_hidden)
            df = warpgroup_mma_wait(0, deps=[df])
            if QUERY:
                _free(empty, LAYER + i)
            if (i + 1) * _CHUNK == F:
                mbarrier.arrive(token_empty.index(_G), count=1)
            value, slope = squareplus_of_half_and_slope(u[i], RELATIVE)
            value = power(value, i // 2 + 1)
            if QUERY:
                _store(staged, 0 if WEIGHTS else i % 2, work, value.to(dtype), row, i * _CHUNK)
            else:
                kept = gl.convert_layout(_permuted(value.to(dtype)), _by_quad(_CHUNK))
                gl.store(_scratch(scratch, t, i * _CHUNK, WORK), kept)
            gradient = ((df + c[:, None] * z) * (0.5 * (i // 2 + 1)) * (value * slope)).to(dtype)
            if WEIGHTS:
                _store(staged, 1 if QUERY else i % 2, work, gradient, row, F + i * _CHUNK)
            else:
                gradient = pin(gradient)
            du += (gradient,)
        head_table = table + h * stride_table if TABLE else table
        head = (b.to(gl.int64) * N * H + h) * D
        if not QUERY:
            # The features come back: every thread reads what itself has stored.
            acc = gl.zeros((_ROWS, D), gl.float32, layout=_WIDE)
            for i in gl.static_range(F // _CHUNK):
                f = gl.convert_layout(_permuted(gl.load(_scratch(scratch, t, i * _CHUNK, WORK))), left)
                acc = warpgroup_mma(f, _block(ring, LAYER + i, t), acc, use_acc=i > 0, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            for i in gl.static_range(F // _CHUNK):
                _free(empty, LAYER + i)
            _store_tokens(dv + head, acc.to(dtype), start, count, H, head_table, RATE, TABLE, D)

        # Back through both layers.
        acc = gl.zeros((_ROWS, D), gl.float32, layout=_WIDE)
        for j in range(CHUNKS + opaque_zero(t)):
            use = BACK + (1 + P) * j
            bias = row_vector(biases, h * F + j * _CHUNK, _CHUNK, across_hidden)
            da = gl.zeros((_ROWS, _CHUNK), gl.float32, layout=_HIDDEN)
            for k in gl.static_range(1 + P):
                _wait(full, use + k)
            for i in gl.static_range(F // _CHUNK):
                w = _block(ring, use + i // 2, t).slice(i % 2 * _CHUNK, _CHUNK, dim=1)
                da = warpgroup_mma(gl.convert_layout(du[i], left), w.permute((1, 0)), da, use_acc=i > 0, is_async=True)
            half = gl.zeros((_ROWS, _CHUNK), gl.float32, layout=_HIDDEN) + bias
            half = warpgroup_mma(_tokens(tokens, x_slot, t), _w1_block(ring, use + P, t), half, is_async=True)
            half, da = warpgroup_mma_wait(0, deps=[half, da])
            inner = (da * silu_grad_of_half(half)).to(dtype)
            if WEIGHTS:
                _store(staged, j % 2, work, inner, row, 3 * F + j * _CHUNK)
            else:
                inner = pin(inner)
            a = gl.convert_layout(inner, left)
            acc = warpgroup_mma(a, _w1_block(ring, use + P, t).permute((1, 0)), acc, is_async=True)
            acc, a = warpgroup_mma_wait(0, deps=[acc, a])
            for k in gl.static_range(1 + P):
                _free(empty, use + k)
        mbarrier.arrive(token_empty.index(_X), count=1)
        bias = row_vector(biases, (t + 1) // tiles % H * F, _CHUNK, across_hidden)  # of the next tile
        result = 2.0 * acc
        if added is not None:
            result += _load_tokens(added + head, start, count, H, D).to(gl.float32)
        if QUERY:
            place = staged.index(0)
            tma.store_wait(0)
            view(place, [_ROWS, D], _MATRIX).store(result.to(dtype))
            fence_async_shared()
            copy_out(dx, [b, start, h * D], place)
            tma.store_wait(0)
        else:
            _store_tokens(dx + head, result.to(dtype), start, count, H, head_table, RATE, TABLE, D)
    tma.store_wait(0)


@gluon.jit
def _wait(full, use):
    mbarrier.wait(full.index(use % _STAGES), use // _STAGES & 1)


@gluon.jit
def _free(empty, use):
    mbarrier.arrive(empty.index(use % _STAGES), count=1)


@gluon.jit
def _tokens(tokens, slot, t):
    return tokens.index(slot + opaque_zero(t))


@gluon.jit
def _block(ring, use, t):
    """64 rows of W2 or S, 128 columns."""
    return ring.index(use % _STAGES + opaque_zero(t))


@gluon.jit
def _w1_block(ring, use, t):
    """64 columns of W1, 128 rows."""
    return view(ring.index(use % _STAGES + opaque_zero(t)), [2 * _CHUNK, _CHUNK], _MATRIX)


@gluon.jit
def _contract(tokens, slot, ring, use: gl.constexpr, t):
    """g Sᵀ for 64 features, under way."""
    acc = gl.zeros((_ROWS, _CHUNK), gl.float32, layout=_HIDDEN)
    s = _block(ring, use, t).permute((1, 0))
    return warpgroup_mma(_tokens(tokens, slot, t), s, acc, use_acc=False, is_async=True)


@gluon.jit
def _halves(x):
    """The two halves of a product's columns."""
    first, second = x.reshape([_ROWS, 2, _CHUNK]).permute((0, 2, 1)).split()
    return (gl.convert_layout(first, _HIDDEN), gl.convert_layout(second, _HIDDEN))


@gluon.jit
def _store(staged, half, work, tile, row, column):
    """A tile of 64 columns to (row, column) of the work space, by way of half of `staged`.

    The halves take turns: whatever was copied before the last time has left.
    """
    place = view(staged.index(0), [2, _ROWS, _CHUNK], _MATRIX).index(half)
    tma.store_wait(1)
    place.store(tile)
    fence_async_shared()
    copy_out(work, [row, column], place)


@gluon.jit
def _scratch(scratch, t, column: gl.constexpr, WORK: gl.constexpr):
    """Where each thread keeps its numbers of 64 columns of tile t."""
    layout: gl.constexpr = _by_quad(_CHUNK)
    row = gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    columns = column + gl.arange(0, _CHUNK, layout=gl.SliceLayout(0, layout))
    return scratch + (t * _ROWS).to(gl.int64) * WORK + (row * WORK)[:, None] + columns[None, :]


@gluon.jit
def _permuted(tile):
    """A product's columns so that each thread has 8 in a row: it moves nothing. Twice, it leaves them as they were."""
    parts = tile.reshape([_ROWS, _CHUNK // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4))
    return parts.reshape([_ROWS, _CHUNK])


@constexpr_function
def _by_quad(columns):
    """Layout of 128 rows of 16-bit numbers in eight warps: rows as a product has them, 8 columns of one to a thread."""
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0]] + [[0, 32 << i] for i in range((columns // 32).bit_length() - 1)],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0], [64, 0]],
        block_bases=[],
        shape=[128, columns],
    )


@gluon.jit
def _store_tokens(out, tile, start, count, H, table, RATE: gl.constexpr, TABLE: gl.constexpr, D: gl.constexpr):
    """A tile's rows to their tokens' of one head of a contiguous tensor."""
    layout: gl.constexpr = _by_quad(D)
    token = start + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, layout))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, layout))
    rows = linear_tokens(token, token < count, table, RATE, TABLE)
    pointers = out + (rows * (H * D))[:, None] + channels[None, :]
    gl.store(pointers, gl.convert_layout(tile, layout), mask=(token < count)[:, None])


@gluon.jit
def _load_tokens(x, start, count, H, D: gl.constexpr):
    """A tile's rows of one head of a contiguous tensor."""
    token = start + gl.arange(0, _ROWS, layout=gl.SliceLayout(1, _WIDE))
    channels = gl.arange(0, D, layout=gl.SliceLayout(0, _WIDE))
    pointers = x + (token.to(gl.int64) * (H * D))[:, None] + channels[None, :]
    return gl.load(pointers, mask=(token < count)[:, None], other=0.0)
