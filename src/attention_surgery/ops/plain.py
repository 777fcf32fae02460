"""Whether a module may be taken apart: whether its parameters say all that calling it does."""

from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Of a module: what its call runs besides its forward."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling `module` is the `forward` of `kind` on plain parameters, and nothing more.

    Not with LoRA, quantized or distributed weights, hooks on it or on all modules, another `forward`.
    """
    if type(module) is not kind or not isinstance(module.forward, MethodType):
        return False
    other = module.forward.__func__ is not kind.forward
    if other or _has_any_global_hook() or any(getattr(module, name) for name in HOOKS):
        return False
    return all(type(x) in (nn.Parameter, Tensor) for x in _parameters(module))


def keeps_dtype(module: nn.Module, x: Tensor) -> bool:
    """Whether products of `x` and the parameters of `module` have the dtype of `x`, as they are or under autocast."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        return x.dtype == torch.get_autocast_dtype(kind)
    return all(parameter.dtype == x.dtype for parameter in _parameters(module))


def _parameters(module: nn.Module) -> list[Tensor]:
    """Weight and bias, also where a wrapper keeps them as plain attributes."""
    return [x for x in (getattr(module, name, None) for name in ("weight", "bias")) if x is not None]
