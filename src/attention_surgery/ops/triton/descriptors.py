"""How tensors of tokens and stacks of matrices are handed to the kernels: what tensor descriptors are made of."""

from torch import Tensor

ALIGNMENT = 16
"""Bytes that addresses and strides of a descriptor are multiples of."""

MAX_TOKEN_STRIDE = 2**23
"""Elements between tokens: a tile of 128 of them must stay within 32-bit offsets."""

MAX_WIDTH = 2**31
"""Elements from the first head of a token to past its last: a descriptor's coordinates are 32-bit."""


def dense(x: Tensor) -> Tensor:
    """`x`, contiguous and aligned; a copy if it is not."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT == 0 else x.clone()


def aligned(x: Tensor) -> Tensor:
    """`x` (b n h d), or a dense copy where no descriptor fits: channels apart, overlaps, odd or vast strides."""
    step = ALIGNMENT // x.element_size()
    walked = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.stride(3) == 1 and all(stride > 0 and stride % step == 0 for stride in walked)
    fits = fits and x.stride(1) < MAX_TOKEN_STRIDE and x.shape[2] * x.stride(2) < MAX_WIDTH
    return x if fits and x.data_ptr() % ALIGNMENT == 0 else dense(x)


Tiled = tuple[Tensor, list[int], list[int], list[int]]
"""Tensor, shape, strides and shape of a block: the arguments of Triton's and of Gluon's descriptor."""


def token_blocks(x: Tensor, rows: int) -> Tiled:
    """b n h d (aligned) as b × n × (h, d), in blocks of `rows` tokens of one head."""
    b, n, h, d = x.shape
    width = (h - 1) * x.stride(2) + d if h > 1 else d
    strides = [x.stride(0) if b > 1 else width, x.stride(1) if n > 1 else width, 1]  # those of a single entry are free
    return x, [b, n, width], strides, [1, rows, d]


def matrix_blocks(x: Tensor, rows: int, columns: int) -> Tiled:
    """A dense stack of matrices (… r c) as (…·r) × c, in blocks of `rows` × `columns`."""
    x = x.view(-1, x.shape[-1])
    return x, list(x.shape), [x.shape[1], 1], [rows, columns]
