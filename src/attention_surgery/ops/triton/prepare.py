# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
"""φ's parameters and a state as the other kernels take them, in the dtype of the tokens and scaled: by one launch."""

import triton
import triton.language as tl

from .tiles import kernel


@kernel
def prepare_kernel(
    w1, b1, w2, b2, state, mass, made_w1, made_w2, made_biases, made_state, made_mass,
    of_w1, of_w2, of_b, of_state, of_mass, scale, state_scale, BLOCK: tl.constexpr,
):  # fmt: skip
    """Every tensor is contiguous and has so many numbers. Grid: as many programs as all have blocks."""
    block = tl.program_id(0)
    block = _convert(block, w1, made_w1, of_w1, scale, BLOCK)
    block = _convert(block, w2, made_w2, of_w2, scale, BLOCK)
    block = _convert(block, b1, made_biases, of_b, scale, BLOCK)
    block = _convert(block, b2, made_biases + of_b, of_b, scale, BLOCK)
    if state is not None:
        block = _convert(block, state, made_state, of_state, state_scale, BLOCK)
    if mass is not None:
        _convert(block, mass, made_mass, of_mass, state_scale, BLOCK)


@triton.jit
def _convert(block, source, target, count, scale, BLOCK: tl.constexpr):
    """Block `block` of `source`, scaled, to `target`; returns `block` less the blocks that `source` has."""
    if block >= 0:
        i = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(source + i, mask=i < count, other=0.0).to(tl.float32) * scale
        tl.store(target + i, x.to(target.dtype.element_ty), mask=i < count)
    return block - tl.cdiv(count, BLOCK)
