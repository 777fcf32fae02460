"""Loading a diffusers Wan pipeline, by path, hub id, or as the embedded tiny one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import ModelError
from .teacher import tiny_wan

if TYPE_CHECKING:
    import torch

EMBEDDED = "tiny-wan"
"""The name that stands for the pipeline that ships with this library."""


def resolve_base(base: str | Path) -> str:
    """The folder of the embedded pipeline for "tiny-wan"; anything else (a folder, a hub id) as it is."""
    return str(tiny_wan() if str(base) == EMBEDDED else base)


def resolve_device(device: str) -> "torch.device":
    """A torch device; "auto" is a GPU (of several processes each takes its own), or the CPU where there is none."""
    import torch

    if device != "auto":
        return torch.device(device)
    if not torch.cuda.is_available():
        return torch.device("cpu")
    from .processes import join_processes

    return cast(torch.device, join_processes(cpu=False).device)


def load_pipeline(base: str | Path, *, dtype: "torch.dtype", device: str = "auto", **components: Any) -> Any:
    """Load `base` in `dtype` onto `device`; `components` (such as transformer=…) take the place of its own.

    Raises:
        ModelError: `base` is no Wan pipeline, or does not take one of the components.
    """
    import diffusers

    source = resolve_base(base)
    # `DiffusionPipeline.from_pretrained` drops components that are passed to it without a word: ask the class itself.
    name = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(source))["_class_name"]
    if not name.startswith("Wan"):
        raise ModelError(f"{base} is a {name}; expected a Wan pipeline")
    pipe = getattr(diffusers, name).from_pretrained(source, dtype=dtype, **components)
    for part, module in components.items():
        if getattr(pipe, part) is not module:
            raise ModelError(f"{name} did not take the {part} that was passed to it")
    return pipe.to(resolve_device(device))
