"""Block sizes of every kernel: a plain table by head dim and architecture, with rules for dtype and degree."""

from dataclasses import dataclass, replace
from typing import Literal

import torch

Kernel = Literal[
    "state", "merge", "attend", "output_gradient", "map_gradient", "value_gradient", "softmax_tokens", "token_product",
    "sum_products", "query_gradient", "key_gradient",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one kernel cuts its work.

    Args:
        rows: tokens of a tile.
        warps: per program.
        stages: depth of the software pipeline.
        hidden: hidden units of φ at a time, where φ is computed.
        across: tokens of the other side at a time, in attention.
        resident: whether the weights of a slice of φ stay in shared memory ("state" only).
        registers: most per thread, so that two programs fit a multiprocessor (None: no limit).
    """

    rows: int
    warps: int
    stages: int = 2
    hidden: int = 32
    across: int = 64
    resident: bool = False
    registers: int | None = None


HOPPER: dict[tuple[Kernel, int], Blocks] = {
    ("state", 128): Blocks(rows=64, hidden=128, warps=8, resident=True),
    ("merge", 128): Blocks(rows=64, hidden=32, warps=4, stages=3),
    ("attend", 128): Blocks(rows=128, across=128, warps=8, stages=3),
    ("output_gradient", 128): Blocks(rows=32, warps=4),
    ("map_gradient", 128): Blocks(rows=64, hidden=32, warps=4, stages=3),
    ("value_gradient", 128): Blocks(rows=64, warps=4),
    ("softmax_tokens", 128): Blocks(rows=64, warps=4),
    ("token_product", 128): Blocks(rows=64, warps=8, stages=3),
    ("sum_products", 128): Blocks(rows=8, warps=4),
    ("query_gradient", 128): Blocks(rows=128, across=64, warps=8, stages=3),
    ("key_gradient", 128): Blocks(rows=64, across=64, warps=4),
    ("state", 64): Blocks(rows=64, hidden=64, warps=4, resident=True),
    ("merge", 64): Blocks(rows=64, hidden=64, warps=4),
    ("attend", 64): Blocks(rows=128, across=128, warps=8, stages=3),
    ("output_gradient", 64): Blocks(rows=64, warps=4),
    ("map_gradient", 64): Blocks(rows=64, hidden=32, warps=4),
    ("value_gradient", 64): Blocks(rows=64, warps=4),
    ("softmax_tokens", 64): Blocks(rows=64, warps=4),
    ("token_product", 64): Blocks(rows=64, warps=4, stages=3),
    ("sum_products", 64): Blocks(rows=32, warps=4),
    ("query_gradient", 64): Blocks(rows=128, across=64, warps=8),
    ("key_gradient", 64): Blocks(rows=128, across=64, warps=8),
}
"""sm_90, 16-bit dtypes; head dim 32 takes those of 64."""

GENERIC: dict[Kernel, Blocks] = {
    "state": Blocks(rows=32, warps=8),
    "merge": Blocks(rows=32, warps=8, stages=1),
    "attend": Blocks(rows=32, across=64, warps=8),
    "output_gradient": Blocks(rows=32, warps=4),
    "map_gradient": Blocks(rows=32, warps=8, stages=1),
    "value_gradient": Blocks(rows=64, warps=8, stages=1),
    "softmax_tokens": Blocks(rows=32, warps=4),
    "token_product": Blocks(rows=32, warps=8, stages=1),
    "sum_products": Blocks(rows=32, warps=4),
    "query_gradient": Blocks(rows=64, across=32, warps=8, stages=1),
    "key_gradient": Blocks(rows=64, across=32, warps=8, stages=1),
}
"""16-bit dtypes elsewhere: small enough for 99 KB of shared memory."""

SINGLE = Blocks(rows=16, across=16, hidden=16, warps=8, stages=1)
"""float32: operands that three TF32 products share fill the registers; at head dim 128 some kernels still spill. Where
a product has 64 rows, four warps: Triton 3.6 goes wrong with Hopper's matrix unit if eight share them."""

INTERPRETED = Blocks(rows=16, across=16, hidden=16, warps=4)


def blocks_of(kernel: Kernel, *, head_dim: int, degree: int, dtype: torch.dtype, arch: int | None) -> Blocks:
    """The blocks of `kernel`; `arch` is 10·major + minor of the compute capability, None in the interpreter."""
    if arch is None:
        return INTERPRETED
    if dtype.itemsize == 4:
        narrow = head_dim == 64 and kernel in ("state", "token_product")
        return replace(SINGLE, warps=4) if narrow else SINGLE
    if arch != 90 or (degree == 3 and head_dim == 128 and kernel in ("state", "merge")):
        return GENERIC[kernel]
    return HOPPER[kernel, max(head_dim, 64)]
