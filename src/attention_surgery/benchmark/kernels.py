"""Dense attention: every kernel that may run on the device, so that the fastest of them is what the hybrid has to beat.

Names of diffusers' dispatcher are what its models take, and what the hybrid's softmax part takes. Beside them, for the
operator alone: PyTorch's kernels called on views, without the copies that the dispatcher makes for cuDNN, and
FlexAttention, compiled. (FlexAttention cannot stand for the hybrid: it gives the log-sum-exp but not the row maximum of
Eq. 5, and a mask of every R-th token leaves no block of keys to skip.)
"""

import importlib.util
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    _CAN_USE_FLASH_ATTN,
    _CAN_USE_FLASH_ATTN_3,
    _HUB_KERNELS_REGISTRY,
    AttentionBackendName,
)
from torch import Tensor
from torch.library import custom_op
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..ops.eager import softmax_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q: b n h d, k and v: b m h d; returns b n h d."""

DIRECT = {
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
}
FLEX = "flex"
FLASH_4 = "flash_4_hub"


def own_kernels(device: torch.device) -> tuple[str, ...]:
    """PyTorch's kernels, by the names of diffusers: those that need no other package."""
    return ("native",) if device.type == "cpu" else ("native", "_native_cudnn", "_native_flash")


def dispatched_kernels(device: torch.device) -> tuple[str, ...]:
    """All kernels that diffusers' models can use here, as far as the packages that are installed tell."""
    if device.type == "cpu":
        return own_kernels(device)
    further = {"flash": _CAN_USE_FLASH_ATTN, "_flash_3": _CAN_USE_FLASH_ATTN_3, FLASH_4: _has_flash_4()}
    return (*own_kernels(device), *(name for name, there in further.items() if there))


def operator_kernels(device: torch.device) -> tuple[str, ...]:
    """Further kernels, which only the operator is measured with."""
    return () if device.type == "cpu" else (*DIRECT, FLEX)


def dispatched(kernel: str) -> AttentionBackendName:
    """The kernel of that name as diffusers' processors hold it, ready to be called."""
    if kernel == FLASH_4:
        _bring_flash_4()
    return AttentionBackendName(kernel)


def dense_attention(kernel: str) -> Attention:
    """softmax(q kᵀ/√D) v by the kernel of that name."""
    if kernel in DIRECT:
        return lambda q, k, v: _on_views(q, k, v, DIRECT[kernel])
    if kernel == FLEX:
        return _compiled_flex()
    backend = dispatched(kernel)
    return lambda q, k, v: softmax_attention(q, k, v, backend)


def _has_flash_4() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:  # flash_attn itself
        return False


@cache
def _bring_flash_4() -> None:
    """Give diffusers' backend for FlashAttention-4 the installed package, in place of the hub's.

    As operators, since `torch.compile` does not see through the package: it breaks graphs, or with `fullgraph` fails.
    """
    from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd  # type: ignore[import-not-found]

    @custom_op("attention_surgery::flash_4", mutates_args=())
    def flash_4(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _flash_attn_fwd(q, k, v, softmax_scale=scale, return_lse=True)
        return out, lse

    @flash_4.register_fake
    def _(q, k, v, scale):
        b, n, h, _ = q.shape
        return q.new_empty(b, n, h, v.shape[3]), q.new_empty(b, h, n, dtype=torch.float32)

    @custom_op("attention_surgery::flash_4_backward", mutates_args=())
    def flash_4_backward(
        grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = _flash_attn_bwd(q, k, v, out, grad, lse, scale)
        return dq, dk, dv

    @flash_4_backward.register_fake
    def _(grad, q, k, v, out, lse, scale):
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.scale = inputs
        ctx.save_for_backward(*tensors, *output)

    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *flash_4_backward(grad.contiguous(), *ctx.saved_tensors, ctx.scale), None

    flash_4.register_autograd(backward, setup_context=keep)

    def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False) -> Tensor:
        assert not causal
        return flash_4(q, k, v, softmax_scale)[0]

    _HUB_KERNELS_REGISTRY[AttentionBackendName.FLASH_4_HUB].kernel_fn = attend


def _on_views(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@cache
def _compiled_flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
