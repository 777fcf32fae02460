"""What the kernels can do, asked without importing Triton."""

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...rates import Rate

if TYPE_CHECKING:
    from ...layers.feature_map import FeatureMap

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (32, 64, 128)
DEGREES = (1, 2, 3)


def unsupported(q: Tensor, phi_q: "FeatureMap", phi_k: "FeatureMap", rate: Rate) -> str | None:
    """Why the kernels cannot take these arguments, which have passed `hybrid.check_tensors`; None if they can."""
    reason = device_lacks(q.device.type, q.device.index)
    if reason is not None:
        return reason
    if q.dtype not in DTYPES:
        return f"dtype {q.dtype} has no kernels; expected one of {DTYPES}"
    if q.shape[3] not in HEAD_DIMS:
        return f"head dim {q.shape[3]} has no kernels; expected one of {HEAD_DIMS}"
    if rate != "linear" and rate != 1 and q.shape[1] == 1:
        return "a single token leaves no linear token to compute"
    for name, phi in {"phi_q": phi_q, "phi_k": phi_k}.items():
        if torch.nn.Module not in type(phi).__bases__:
            return f"{name} is a {type(phi).__name__}, whose activations the kernels do not know; expected a FeatureMap"
        if (phi.degree not in DEGREES) or phi.layers != 2:
            return f"{name} has degree {phi.degree} and {phi.layers} layers; expected degree {DEGREES} and 2 layers"
        if phi.weights[0].device != q.device:
            return f"{name} is on {phi.weights[0].device} and q on {q.device}; expected one device"
    return None


@torch.compiler.assume_constant_result
def device_lacks(kind: str, index: int | None) -> str | None:
    """Why kernels cannot run on a device; None if they can."""
    return _ask_device(kind, index, os.environ.get("TRITON_INTERPRET") == "1")


@cache
def _ask_device(kind: str, index: int | None, interpreted: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if kind == "cpu" and interpreted:
        return None
    if kind != "cuda":
        return f"device type {kind!r} has no kernels; expected 'cuda'"
    if torch.version.hip is not None:
        return "the kernels were not tried on ROCm"
    if torch.cuda.get_device_capability(index) < (8, 0):
        return f"{torch.cuda.get_device_name(index)} is older than compute capability 8.0"
    return None
