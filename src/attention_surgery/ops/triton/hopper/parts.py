# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false, reportAssignmentType=false, reportCallIssue=false, reportAttributeAccessIssue=false
"""What the specialized kernels share: copies, views and barriers of shared memory, and two tricks on ptxas."""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..descriptors import matrix_blocks, token_blocks

GROUP_TOKENS: int = 64
"""Tokens of one group of four warps: the rows of one product."""

MATRIX = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
TOKENS = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=3)
"""Layouts in shared memory of matrices and of tiles of tokens."""

copy_in = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
copy_out = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
"""Copies that are not waited for: of tiles, of rows anywhere, and of tiles back. The first names are Triton 3.9's."""

_PUBLIC_VIEW = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # from Triton 3.9 on


@gluon.jit
def view(memory, SHAPE: gl.constexpr, layout: gl.constexpr):
    """The same bytes of shared memory in another shape."""
    if _PUBLIC_VIEW:
        found = memory.reinterpret(memory.dtype, SHAPE, layout)
    else:
        found = memory._reinterpret(memory.dtype, SHAPE, layout)
    return found


@gluon.jit
def barriers(N: gl.constexpr, ARRIVALS: gl.constexpr):
    """N barriers in shared memory, whose phases end after so many arrivals (and the bytes that they are told of)."""
    found = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def row_vector(pointer, start, N: gl.constexpr, layout: gl.constexpr):
    """N consecutive values as float32, along the columns of a tile."""
    return gl.load(pointer + start + gl.arange(0, N, layout=layout)).to(gl.float32)[None, :]


@gluon.jit
def opaque_zero(t):
    """0, which the compiler does not know: addresses made with it stay in the loop instead of filling registers."""
    return gl.inline_asm_elementwise("and.b32 $0, $1, 0;", "=r,r", [t], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def pin(a):
    """`a` (16-bit), which ptxas must have computed before what follows.

    It would sink activations behind a wait for products that they should overlap with. The store, which it does not
    move, never happens: no conversion to 16 bits gives a register of ones only (a NaN is 0x7FFF).
    """
    return gl.inline_asm_elementwise(
        """{
        .reg .pred p;
        .reg .b32 t;
        and.b32 t, $8, $9;
        and.b32 t, t, $10;
        and.b32 t, t, $11;
        and.b32 t, t, $12;
        and.b32 t, t, $13;
        and.b32 t, t, $14;
        and.b32 t, t, $15;
        setp.eq.u32 p, t, 0xffffffff;
        @p st.volatile.shared.b32 [t], t;
        mov.b32 $0, $8;
        mov.b32 $1, $9;
        mov.b32 $2, $10;
        mov.b32 $3, $11;
        mov.b32 $4, $12;
        mov.b32 $5, $13;
        mov.b32 $6, $14;
        mov.b32 $7, $15;
        }""",
        "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r,r,r,r,r",
        [a],
        dtype=a.dtype,
        is_pure=False,
        pack=16,
    )


def token_descriptor(x: Tensor, rows: int = GROUP_TOKENS) -> TensorDescriptor:
    """b n h d (aligned) as b × n × (h, d), in blocks of `rows` tokens of one head."""
    return TensorDescriptor(*token_blocks(x, rows), TOKENS)


def matrix_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A dense stack of matrices (… r c) as (…·r) × c, in blocks of `rows` × `columns`."""
    return TensorDescriptor(*matrix_blocks(x, rows, columns), MATRIX)
