"""Nothing is timed before it is right: every variant against float64, at a small size, values and gradients.

An error may be at most twice (gradients: three times) that of the plain implementation in the same dtype: for the
kernels the PyTorch path, for the PyTorch path and for dense attention the formula itself.

What goes wrong only where many programs run at once shows at no small size. So the kernels are set beside the PyTorch
path at the size that is timed too.
"""

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..layers.feature_map import FeatureMap
from ..ops import naive
from .shapes import Shape
from .variants import Variant
from .workloads import Place, build_transformer, operator, transformer_inputs, wear

TOKENS = 515
HEADS = 3
VIDEO = (17, 160, 224)
"""Of the model that stands for a larger one: 700 tokens, or 175 where the VAE compresses more."""

_log = logging.getLogger("attention_surgery")

Attention = Callable[[Tensor, Tensor, Tensor, FeatureMap, FeatureMap], Tensor]


@dataclass(frozen=True)
class Verdict:
    """Whether a variant may be timed, and why not."""

    status: Literal["verified", "wrong", "does not run"]
    note: str

    @property
    def good(self) -> bool:
        return self.status == "verified"


def verify(variant: Variant, shape: Shape, place: Place, *, model: bool) -> Verdict:
    """Check `variant` at the head dim of `shape`: the operator by itself, or within the blocks of a small model."""
    check = verify_model if model else verify_operator
    try:
        worst = check(variant, shape, place)
    except Exception as error:  # named in the table; a hybrid that does not run ends the command with an error
        if not variant.stock:
            _log.warning("%s does not run in the check", variant.name, exc_info=error)
        return Verdict("does not run", describe_error(error))
    if worst <= 1:
        return Verdict("verified", f"errors at most {worst:.2f} of what is allowed")
    return Verdict("wrong", f"an error is {worst:.2f} times what is allowed")


def describe_error(error: Exception) -> str:
    """Its kind and the first line of its message."""
    message = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {message[0][:200]}"


def verify_at_size(variant: Variant, shape: Shape, place: Place) -> str | None:
    """What is wrong with a hybrid operator at the very size of `shape`; None if nothing is.

    Output and gradients of q, k and v may differ from the PyTorch path's by four roundings, and nothing but is finite.
    """
    torch.manual_seed(0)
    size = (1, shape.tokens, shape.spec.heads, shape.spec.head_dim)
    tensors = [place.random(*size) for _ in range(4)]
    maps = [FeatureMap(shape.spec.heads, shape.spec.head_dim).to(place.device, place.dtype) for _ in range(2)]

    def results(variant: Variant) -> list[Tensor]:
        return _operator_results(
            lambda q, k, v, *phis: operator(variant, *phis)(q, k, v), tensors, maps, place.dtype
        )  # fmt: skip

    found, plain = results(variant), results(replace(variant, backend="eager", compiled=False))
    allowed = 4 * torch.finfo(place.dtype).eps
    for name, ours, theirs in zip(("y", "dq", "dk", "dv"), found, plain, strict=False):
        error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
        if not error <= allowed:
            return f"{name} is {error:.2g} from the PyTorch path's at {shape.tokens} tokens; {allowed:.2g} is allowed"
    if not all(bool(slope.isfinite().all()) for slope in found):
        return f"a gradient of φ is not finite at {shape.tokens} tokens"
    return None


def verify_operator(variant: Variant, shape: Shape, place: Place) -> float:
    """The worst error as a part of what is allowed, of y and of the gradients of q, k, v and φ's parameters."""
    head_dim = shape.spec.head_dim
    torch.manual_seed(0)
    tensors = [place.random(1, TOKENS, HEADS, head_dim) for _ in range(4)]
    maps = [FeatureMap(HEADS, head_dim).to(place.device, place.dtype) for _ in range(2)]

    def candidate(q: Tensor, k: Tensor, v: Tensor, phi_q: FeatureMap, phi_k: FeatureMap) -> Tensor:
        return operator(variant, phi_q, phi_k)(q, k, v)

    def formula(q: Tensor, k: Tensor, v: Tensor, phi_q: FeatureMap, phi_k: FeatureMap) -> Tensor:
        return naive.hybrid_attention(
            q, k, v, phi_q, phi_k, rate=variant.rate, normalizer=variant.normalizer, pattern=variant.pattern
        )

    def path(q: Tensor, k: Tensor, v: Tensor, phi_q: FeatureMap, phi_k: FeatureMap) -> Tensor:
        return operator(replace(variant, backend="eager", compiled=False), phi_q, phi_k)(q, k, v)

    plain = path if variant.backend == "triton" or variant.compiled else formula
    oracle = _operator_results(formula, tensors, maps, torch.float64)
    allowed = _errors(_operator_results(plain, tensors, maps, place.dtype), oracle)
    return _worst(_errors(_operator_results(candidate, tensors, maps, place.dtype), oracle), allowed, outputs=1)


def verify_model(variant: Variant, shape: Shape, place: Place) -> float:
    """The same of a transformer of two blocks: its output, and the gradients of its latents and of all weights."""
    spec = replace(shape.spec, blocks=2, heads=HEADS, ffn_dim=4 * HEADS * shape.spec.head_dim)
    small = replace(shape, spec=spec, video=VIDEO, tokens=spec.tokens(*VIDEO))
    torch.manual_seed(0)
    stock = build_transformer(small, place)
    inputs = transformer_inputs(small, place)
    gradient = torch.randn_like(inputs["hidden_states"])
    path = replace(variant, backend="eager" if variant.backend else "", kernel="native", compiled=False)
    torch.manual_seed(1)
    candidate = wear(stock, variant, variant.rate)
    torch.manual_seed(1)
    plain = wear(stock, path, variant.rate)
    plain.load_state_dict(candidate.state_dict())
    exact = copy.deepcopy(plain).double()
    oracle = _model_results(exact, inputs, gradient, torch.float64)
    allowed = _errors(_model_results(plain, inputs, gradient, place.dtype), oracle)
    return _worst(_errors(_model_results(candidate, inputs, gradient, place.dtype), oracle), allowed, outputs=2)


def _operator_results(
    attend: Attention, tensors: Sequence[Tensor], maps: Sequence[FeatureMap], dtype: torch.dtype
) -> list[Tensor]:
    *inputs, gradient = (tensor.detach().to(dtype).clone() for tensor in tensors)
    phis = [copy.deepcopy(phi).to(dtype) for phi in maps]
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    y = attend(q, k, v, *phis)
    leaves = [*inputs, *(parameter for phi in phis for parameter in phi.parameters())]
    found = torch.autograd.grad(y, leaves, gradient, allow_unused=True)
    return [y.detach(), *(slope for slope in found if slope is not None)]


def _model_results(model: Any, inputs: dict[str, Any], gradient: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Output with gradients and without, gradient of the latents, and those of all weights of a kind in one."""
    arguments = {
        name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    latents = arguments["hidden_states"].detach().clone().requires_grad_()
    with torch.no_grad():
        (bare,) = model(**arguments)
    (y,) = model(**arguments | {"hidden_states": latents})
    y.backward(gradient.to(dtype))
    kinds: dict[bool, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            kinds.setdefault(".processor." in name, []).append(parameter.grad.double().flatten())
            parameter.grad = None
    slope: Any = latents.grad
    return [bare, y.detach(), slope, *(torch.cat(slopes) for slopes in kinds.values())]


def _errors(found: Sequence[Tensor], oracle: Sequence[Tensor]) -> list[float]:
    return [
        float((ours.double() - exact).norm() / exact.norm()) for ours, exact in zip(found, oracle, strict=True)
    ]  # fmt: skip


def _worst(errors: Sequence[float], plain: Sequence[float], *, outputs: int) -> float:
    """The largest error as a part of its limit: 2 times the plain one for the `outputs`, 3 times for the gradients."""
    parts = [
        error / ((2 if place < outputs else 3) * limit) if limit else math.inf if error else 0.0
        for place, (error, limit) in enumerate(zip(errors, plain, strict=True))
    ]
    return math.inf if any(math.isnan(part) for part in parts) else max(parts)
