# pyright: reportArgumentType=false
"""Launches of the specialized kernels, for `forward` and `backward`, with the arguments that all kernels share.

Those that compute φ take its parameters halved, which is exact: SiLU, squareplus and their derivatives are then fewer
instructions (`activations.silu_of_half` and the like).
"""

from typing import Any

from torch import Tensor

from ..plan import Map, Plan, Prepared, cdiv, prepare, strides
from .map_gradient import specialized_map_gradient_kernel
from .merge import specialized_merge_kernel
from .parts import GROUP_TOKENS, matrix_descriptor, token_descriptor
from .products import specialized_product_kernel, split_steps
from .state import specialized_state_kernel, split_units

WARPS = {"num_warps": 4}
"""Of the first group, as a kernel is launched; the others are its own affair."""

TILE_TOKENS = 2 * GROUP_TOKENS
"""Tokens of a tile of the gradient of φ's input. The work space has whole ones."""


def linear_state(k: Tensor, v: Tensor, phi: Map, plan: Plan, shared: dict[str, Any]) -> Tensor:
    """The shares of `forward.linear_state`."""
    heads = plan.b * plan.h
    units, programs, shares = split_units(shared["count"], heads, plan.p, plan.processors)
    states, prepared = plan.states(shares), prepare(phi, plan, scale=0.5)
    specialized_state_kernel[(programs * plan.p,)](
        k=k,
        v=v,
        w1=matrix_descriptor(prepared.w1, plan.d, 64),
        w2=matrix_descriptor(prepared.w2, 64, plan.d),
        biases=prepared.biases,
        state=states,
        heads=heads,
        units=units,
        shares=shares,
        D=plan.d,
        P=plan.p,
        **_in_rows(strides("k", k) | strides("v", v)),
        **shared,
        **WARPS,
    )
    return states


def merge(q: Tensor, o: Tensor, state: Tensor, y: Tensor, phi: Map, plan: Plan, shared: dict[str, Any]) -> None:
    """`forward.merge`, into `y`. `o` is of the dtype of `q`: its bytes are copied as they are."""
    prepared = prepare(phi, plan, scale=0.5, state=state)
    tiles = cdiv(plan.n, 2 * GROUP_TOKENS)
    total = tiles * plan.b * plan.h
    specialized_merge_kernel[(min(plan.processors, total),)](
        q=token_descriptor(q),
        o=token_descriptor(o),
        y=token_descriptor(y),
        w1=matrix_descriptor(prepared.w1, plan.d, 64),
        w2=matrix_descriptor(prepared.w2, 64, plan.f),
        biases=prepared.biases,
        state=matrix_descriptor(prepared.state, plan.d, plan.d),
        tiles=tiles,
        total=total,
        stride_qh=q.stride(2),
        stride_oh=o.stride(2),
        D=plan.d,
        F=plan.f,
        **shared,
        **WARPS,
    )


def map_gradient_arguments(
    x: Tensor, g: Tensor, dx: Tensor, work: Tensor, prepared: Prepared, query: bool, padded: int, plan: Plan
) -> dict[str, Any]:
    """What `specialized_map_gradient_kernel` takes in place of the block sizes and descriptors of the general one.

    Of `prepared` φ's parameters are halved.
    """
    assert prepared.state is not None
    return _in_rows(strides("x", x) | strides("g", g)) | {
        "w1": matrix_descriptor(prepared.w1, plan.d, 64),
        "w2": matrix_descriptor(prepared.w2, 64, plan.d),
        "biases": prepared.biases,
        "state": matrix_descriptor(prepared.state, 64, plan.d),
        "work": matrix_descriptor(work, TILE_TOKENS, 64),
        "scratch": None if query else work,
        "dx": token_descriptor(dx, TILE_TOKENS) if query else dx,
        "tiles": padded // TILE_TOKENS,
        "WORK": work.shape[1],
        "D": plan.d,
        "P": plan.p,
        "num_warps": 8,
    }  # fmt: skip


def map_gradient_kernel(heads: int, plan: Plan, **arguments: Any) -> None:
    """`map_gradients.map_gradient_kernel` for a round of heads, and `value_gradient_kernel` on the key side."""
    total = arguments["tiles"] * heads
    specialized_map_gradient_kernel[(min(plan.processors, total),)](total=total, **arguments)


def split_products(padded: int, heads: int, jobs: int, plan: Plan) -> tuple[int, int]:
    """Shares of `padded` tokens, and steps of each, for so many products of a round of heads."""
    return split_steps(padded // GROUP_TOKENS, max(1, jobs * heads), plan.processors)


def product_arguments(x: Tensor, g: Tensor, work: Tensor, plan: Plan) -> dict[str, Any]:
    """What `specialized_product_kernel` takes in place of the block sizes and the work space of the general one."""
    return WARPS | _in_rows(strides("x", x) | strides("g", g)) | {
        "left_work": matrix_descriptor(work, GROUP_TOKENS, plan.d),
        "right_work": matrix_descriptor(work, GROUP_TOKENS, plan.f),
        "D": plan.d,
    }  # fmt: skip


def product_kernel(grid: tuple[int, ...], **arguments: Any) -> None:
    """`map_gradients.token_product_kernel`."""
    specialized_product_kernel[grid](**arguments)


def _in_rows(of_tensors: dict[str, int]) -> dict[str, int]:
    """Strides in units of 16 bytes, which `descriptors.aligned` makes sure of: rows are then known to begin at one."""
    return {name: stride // 8 for name, stride in of_tensors.items()}
