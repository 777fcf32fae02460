"""The public operator: checks its arguments, then takes the fastest correct path for the device at hand."""

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from ..errors import ConfigError, TensorError
from ..rates import Normalizer, Pattern, Rate, check_normalizer, check_pattern, check_rate
from . import eager
from .tokens import Grid, check_grid
from .triton.support import unsupported

if TYPE_CHECKING:
    from ..layers.feature_map import FeatureMap

Backend = Literal["auto", "eager", "triton"]

_log = logging.getLogger("attention_surgery")


class KeySource(NamedTuple):
    """What the kernel for norms and RoPE made k of: k b n h·d, the norm's weight h·d and ε, RoPE's cos and sin n d."""

    k: Tensor
    weight: Tensor
    cos: Tensor
    sin: Tensor
    eps: float


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: "FeatureMap",
    phi_k: "FeatureMap",
    *,
    rate: Rate,
    normalizer: Normalizer = "max",
    pattern: Pattern = "stride",
    grid: Grid | None = None,
    backend: Backend = "auto",
    attention_backend: str | None = None,
    projection: nn.Module | None = None,
    key_source: KeySource | None = None,
) -> Tensor:
    """Softmax attention on every R-th token and learned linear attention on the rest (Eq. 5).

    Args:
        q, k, v: queries, keys, values after QK-norm and RoPE, b n h d, of one dtype and device.
        phi_q, phi_k: feature maps for h heads of d channels.
        rate: 1 is softmax attention, R >= 2 keeps ceil(n/R) softmax keys, "linear" keeps none.
        normalizer: "max" is Eq. 5; "mean" takes c_i as the log of the mean exponential over the softmax tokens.
        pattern: "stride" is the paper's set; see `softmax_token_mask`.
        grid: (frames, rows, columns) of the tokens, for pattern "lattice".
        backend: "eager" is the PyTorch path; "triton" the fused kernels (verified on H200 and H100 only, of
            compute capability 9.0); "auto" takes the kernels where they can run, and on a GPU says in the log, once per
            reason, why they cannot.
        attention_backend: diffusers attention backend of the softmax part under "mean" (None: the active one).
        projection: the output projection of the attention layer, b n h·d → b n c, applied to the result. Given here,
            its input need not be kept for the backward beside the softmax part's output: where both would be (the
            kernels, "mean", R >= 2, a gradient for q), it is computed again if the projection is a plain `nn.Linear`.
        key_source: for hybrid layers: what their kernel for QK-norm and RoPE made k of. Given here, and if k has a
            gradient, the kernels keep only its softmax tokens for the backward, which makes k again. Whether k is what
            the source makes is not checked: gradients are wrong if it is not.

    Returns:
        b n h d, in the dtype of q, or b n c behind a projection. The kernels are differentiable once.

    Raises:
        TensorError: shapes, dtypes or devices that do not fit; the message names the argument.
            Under backend "triton" also what the kernels lack.
        RateError, ConfigError: a rate, normalizer, pattern or backend that does not exist.
    """
    check_rate(rate)
    check_normalizer(normalizer)
    check_pattern(pattern)
    if backend not in get_args(Backend):
        raise ConfigError(f"backend {backend!r} does not exist; expected one of {get_args(Backend)}")
    check_tensors(q, k, v, phi_q, phi_k)
    if isinstance(projection, nn.Linear) and projection.in_features != q.shape[2] * q.shape[3]:
        raise TensorError(
            f"projection takes {projection.in_features} features; q has {q.shape[2]} heads of {q.shape[3]}"
        )
    if key_source is not None:
        check_source(key_source, k)
    check_grid(q.shape[1], pattern, grid)
    path, how = eager.hybrid_attention, {"rate": rate, "normalizer": normalizer, "pattern": pattern, "grid": grid}
    if backend == "triton" or (backend == "auto" and q.device.type == "cuda" and rate != 1):
        reason = unsupported(q, phi_q, phi_k, rate)
        if reason is None:
            from .triton import path as kernels  # Triton is optional, and heavy to import

            path = kernels.hybrid_attention
            if projection is not None and kernels.merges_again(q, rate, normalizer, projection):
                how["projection"], projection = projection, None
            how["key_source"] = key_source
        elif backend == "auto":
            log_once(reason)
        else:
            raise TensorError(f"backend 'triton' cannot run this: {reason}; use backend 'auto' or 'eager'")
    y = path(q, k, v, phi_q, phi_k, attention_backend=attention_backend, **how)
    return y if projection is None else projection(y.flatten(2, 3).type_as(q))


@torch.compiler.assume_constant_result
def log_once(reason: str, what: str = "hybrid attention") -> None:
    """Name, once per reason and process, why a GPU takes the PyTorch path for `what`."""
    _log_reason(reason, what)


@cache
def _log_reason(reason: str, what: str) -> None:
    _log.warning("%s takes the PyTorch path: %s", what, reason)


def check_tensors(q: Tensor, k: Tensor, v: Tensor, phi_q: "FeatureMap", phi_k: "FeatureMap") -> None:
    """TensorError, naming the argument, unless all five belong together."""
    if q.ndim != 4 or 0 in q.shape:
        raise TensorError(f"q has shape {tuple(q.shape)}; expected b n h d, none of them 0")
    for name, tensor in {"k": k, "v": v}.items():
        for what, got, expected in (
            ("shape", tuple(tensor.shape), tuple(q.shape)),
            ("dtype", tensor.dtype, q.dtype),
            ("device", tensor.device, q.device),
        ):
            if got != expected:
                raise TensorError(f"{name} has {what} {got}; expected {expected}, as q")
    if not q.dtype.is_floating_point:
        raise TensorError(f"q has dtype {q.dtype}; expected a floating-point dtype")
    for name, phi in {"phi_q": phi_q, "phi_k": phi_k}.items():
        if (phi.heads, phi.head_dim) != tuple(q.shape[2:]):
            raise TensorError(
                f"{name} is for {phi.heads} heads of {phi.head_dim}; q has {q.shape[2]} heads of {q.shape[3]}"
            )
    if phi_q.features != phi_k.features:
        raise TensorError(f"phi_k has {phi_k.features} features; expected {phi_q.features}, as phi_q")


def check_source(source: KeySource, k: Tensor) -> None:
    """TensorError, naming the tensor, unless `source` is of the shapes that make `k`, on its device."""
    b, n, h, d = k.shape
    sizes = {"k": (b, n, h * d), "weight": (h * d,), "cos": (n, d), "sin": (n, d)}
    for name, size in sizes.items():
        tensor: Tensor = getattr(source, name)
        if tensor.shape != size or tensor.device != k.device:
            raise TensorError(
                f"{name} of key_source is {tuple(tensor.shape)} on {tensor.device}; expected {size} on {k.device}"
            )
    if source.k.dtype != k.dtype:
        raise TensorError(f"k of key_source is {source.k.dtype}; expected {k.dtype}, as k")
