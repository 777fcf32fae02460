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
from diffusers.models.attention_dispatch import _HUB_KERNELS_REGISTRY, AttentionBackendName
from torch import Tensor
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
FLASH_ATTENTION_4 = "flash_4_hub"


def dispatched_kernels(device: torch.device) -> tuple[str, ...]:
    """Kernels that diffusers' models can use here, as far as their packages tell."""
    if device.type == "cpu":
        return ("native",)
    names = ["_native_cudnn", "_native_flash"]
    names += [name for name, package in {"flash": "flash_attn", "_flash_3": "flash_attn_interface"}.items()
              if _installed(package)]  # fmt: skip
    if bring_flash_attention_4():
        names.append(FLASH_ATTENTION_4)
    return tuple(names)


def operator_kernels(device: torch.device) -> tuple[str, ...]:
    """Further kernels, which only the operator is measured with."""
    return () if device.type == "cpu" else (*DIRECT, FLEX)


@cache
def bring_flash_attention_4() -> bool:
    """Give diffusers' backend for FlashAttention-4 the installed package, where there is one, in place of the hub's."""
    if not _installed("flash_attn.cute"):
        return False
    from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]

    _HUB_KERNELS_REGISTRY[AttentionBackendName(FLASH_ATTENTION_4)].kernel_fn = flash_attn_func
    return True


def dense_attention(kernel: str) -> Attention:
    """softmax(q kᵀ/√D) v by the kernel of that name."""
    if kernel in DIRECT:
        return lambda q, k, v: _on_views(q, k, v, DIRECT[kernel])
    if kernel == FLEX:
        return _compiled_flex()
    if kernel == FLASH_ATTENTION_4:
        bring_flash_attention_4()
    return lambda q, k, v: softmax_attention(q, k, v, kernel)


def _on_views(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


@cache
def _compiled_flex() -> Attention:
    from torch.nn.attention.flex_attention import flex_attention

    flex: Any = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: flex(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False
