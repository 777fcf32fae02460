"""The ways of computing attention that are set side by side."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..rates import Normalizer, Pattern, Rate
from .kernels import FLEX, dispatched_kernels, operator_kernels

FASTEST = "fastest"
"""In place of a kernel's name: the one that a trial on this device finds fastest at the variant's rate."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """Dense attention (rate 1) or hybrid attention, by one path.

    Args:
        rate: 1 is dense; R >= 2 hybrid.
        kernel: of dense attention, or of the softmax part under normalizer "mean".
        backend: path of hybrid attention: "triton", or "eager" for PyTorch; "" if dense. Of dense attention in a model
            "triton" is a hybrid layer that is disabled: stock but for the kernel that normalizes and rotates q and k.
        normalizer, pattern: of hybrid attention.
        compiled: whether it runs under `torch.compile`: the operator by itself, or every block of a model.
        graphed: whether all kernels of a call are launched as one CUDA graph: the operator only.
    """

    rate: Rate
    kernel: str = FASTEST
    backend: str = ""
    normalizer: Normalizer = "mean"
    pattern: Pattern = "stride"
    compiled: bool = False
    graphed: bool = False

    @property
    def dense(self) -> bool:
        """Whether it is softmax attention on all tokens."""
        return self.rate == 1

    @property
    def stock(self) -> bool:
        """Whether it is dense attention as diffusers computes it: what the others are held against."""
        return self.dense and not self.backend

    @property
    def name(self) -> str:
        """What people read: "dense _native_cudnn", "R=8 mean", "R=8 max in PyTorch"."""
        if self.dense:
            words = ["dense", self.kernel, *(["with our norms"] if self.backend else [])]
        else:
            words = [f"R={self.rate}", self.normalizer]
            words += [self.pattern] if self.pattern != "stride" else []
            words += ["in PyTorch"] if self.backend == "eager" else []
        words += ["compiled"] if self.compiled else []
        return " ".join([*words, "as a CUDA graph"] if self.graphed else words)

    def with_kernel(self, kernel: str) -> "Variant":
        """The same with `kernel` in place of FASTEST."""
        return replace(self, kernel=kernel) if self.kernel == FASTEST else self


def own_backend(device: torch.device) -> str:
    """The path of hybrid attention that is this library's fastest on `device`."""
    return "triton" if device.type == "cuda" else "eager"


def dense_kernels(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """Dense attention by every kernel; `rates` play no part."""
    kernels = (*dispatched_kernels(device), *operator_kernels(device))
    return tuple(Variant(rate=1, kernel=kernel, compiled=kernel == FLEX) for kernel in kernels)


def own_mean(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """Our default."""
    return tuple(Variant(rate=rate, backend=own_backend(device)) for rate in rates)


def own_max(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """The paper's normalizer on our fastest path."""
    return tuple(replace(variant, normalizer="max") for variant in own_mean(rates, device))


def own_staggered(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """The highest rate, on softmax tokens that are gathered, beside the same on a strided view."""
    stride = own_mean([max(rates)], device)
    return (*stride, *(replace(variant, pattern="staggered") for variant in stride))


def paper_in_pytorch(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """Eq. 5 without kernels: tiles over the queries, in linear memory."""
    return tuple(replace(variant, backend="eager") for variant in own_max(rates, device))


def mean_in_pytorch(rates: Sequence[int], device: torch.device) -> tuple[Variant, ...]:
    """Our default without kernels, eager and compiled."""
    eager = tuple(replace(variant, backend="eager") for variant in own_mean(rates, device))
    return (*eager, *(replace(variant, compiled=True) for variant in eager))
