# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportPossiblyUnboundVariable=false
# pyright: reportOperatorIssue=false
"""The two activations of φ and their derivatives, on float32 tiles: SiLU inside, squareplus at the end.

They stand once more in `layers/feature_map.py`; a change there is a change here. FAST takes the special-function unit's
approximations, whose errors (2^-11 for tanh, 2^-22 for the roots) stay below the rounding to the 16-bit dtypes that
follows; float32 operands take the accurate ones.
"""

import triton
import triton.language as tl

WIDTH = tl.constexpr(0.25)  # b of squareplus: SQUAREPLUS_WIDTH of layers/feature_map.py


@triton.jit
def _tanh(x):
    """Two at a time, as float16; the machine code of sm_90 has a special-function instruction for each all the same."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 pair;
        .reg .b16 first, second;
        cvt.rn.f16x2.f32 pair, $3, $2;
        tanh.approx.f16x2 pair, pair;
        mov.b32 {first, second}, pair;
        cvt.f32.f16 $0, first;
        cvt.f32.f16 $1, second;
        }""",
        "=f,=f,f,f",
        [x],
        dtype=tl.float32,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _tanh_alone(x):
    """One at a time, in three instructions fewer for two: no conversions, but more registers in use at once."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocal(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return 1.0 / x


@triton.jit
def _root(x, FAST: tl.constexpr):
    if FAST:
        return tl.inline_asm_elementwise(
            "sqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return tl.sqrt_rn(x)


@triton.jit
def _inverse_root(x):
    return tl.inline_asm_elementwise(
        "rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def silu(x, FAST: tl.constexpr):
    """x σ(x), with σ(x) = (1 + tanh(x/2)) / 2."""
    if FAST:
        half = 0.5 * x
        return half * _tanh(half) + half
    return x / (1.0 + tl.exp(-x))


@triton.jit
def silu_grad(x, FAST: tl.constexpr):
    if FAST:
        s = 0.5 * _tanh(0.5 * x) + 0.5
    else:
        s = 1.0 / (1.0 + tl.exp(-x))
    return s + x * s * (1.0 - s)


@triton.jit
def squareplus(x, FAST: tl.constexpr):
    """(x + sqrt(x² + b)) / 2 as relu(x) + b / 2(sqrt(x² + b) + |x|), which never cancels."""
    root = _root(x * x + WIDTH, FAST)
    return tl.maximum(x, 0.0) + (0.5 * WIDTH) * _reciprocal(root + tl.abs(x), FAST)


@triton.jit
def silu_of_half(half, ALONE: tl.constexpr):
    """silu(2·half), FAST: two instructions fewer, with weights that were halved before. ALONE as `_tanh_alone`."""
    if ALONE:
        t = _tanh_alone(half)
    else:
        t = _tanh(half)
    return half * t + half


@triton.jit
def squareplus_of_half(half, RELATIVE: tl.constexpr):
    """squareplus(2·half), FAST.

    With RELATIVE as `squareplus`. Otherwise as half + sqrt(half² + b/4), in half the instructions: it cancels for
    negative x = 2·half, with an absolute error of |x|·2^-23. That is for features that are added to a softmax part's
    mass, which is 1 or more: no relative error of theirs counts there.
    """
    root = _root(half * half + 0.25 * WIDTH, True)
    if RELATIVE:
        return 2.0 * tl.maximum(half, 0.0) + (0.25 * WIDTH) * _reciprocal(root + tl.abs(half), True)
    return half + root


@triton.jit
def squareplus_of_half_and_slope(half, RELATIVE: tl.constexpr):
    """`squareplus_of_half`, and 2 / sqrt(x² + b): the derivative of squareplus there is half of their product."""
    square = half * half + 0.25 * WIDTH
    inverse = _inverse_root(square)
    root = square * inverse
    if RELATIVE:
        value = 2.0 * tl.maximum(half, 0.0) + (0.25 * WIDTH) * _reciprocal(root + tl.abs(half), True)
    else:
        value = half + root
    return value, inverse


@triton.jit
def silu_grad_of_half(half):
    """Twice the derivative of SiLU at 2·half, FAST."""
    t = _tanh_alone(half)
    return (1.0 + t) + half * (1.0 - t * t)


@triton.jit
def squareplus_grad(value, FAST: tl.constexpr):
    """The derivative of squareplus where it takes `value`: y / sqrt(x² + b), which is 4y² / (4y² + b)."""
    square = 4.0 * value * value
    return square * _reciprocal(square + WIDTH, FAST)


@triton.jit
def power(x, P):
    """x^P for P = 1, 2, 3, which may be known at run time only (but is the same for the whole tile)."""
    y = x
    if P >= 2:
        y *= x
    if P >= 3:
        y *= x
    return y


@triton.jit
def powers(x, first, WIDTH: tl.constexpr, D: tl.constexpr):
    """Column c of x (… × WIDTH) to the power first + c // D."""
    column = tl.arange(0, WIDTH)[None, :] // D
    y = power(x, first)
    for p in tl.static_range(1, WIDTH // D):
        y = tl.where(column >= p, y * x, y)
    return y


@triton.jit
def power_grad(x, P):
    """P·x^(P-1) for P = 2, 3."""
    y = 2.0 * x
    if P >= 3:
        y *= 1.5 * x
    return y
