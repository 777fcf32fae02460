"""The shapes that are measured: real models at real video sizes, a sweep over N, and small ones for the CPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..cost.__main__ import MODELS
from ..errors import ConfigError
from ..models.wan import WanSpec

SWEEP = "sweep"
"""Stands for all shapes of the sweep over N, where shapes are named."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model and the video it works on.

    Args:
        name: as on the command line and in the table.
        title: for people.
        spec: the model's dimensions.
        tokens: N.
        video: frames, height and width in pixels; None where only the operator is measured.
        channels: of the latents.
        text_dim: width of the text encoder.
        time_per_token: whether every token has a time of its own (Wan2.2 TI2V), which the modulation then has too.
    """

    name: str
    title: str
    spec: WanSpec
    tokens: int
    video: tuple[int, int, int] | None = None
    channels: int = 16
    text_dim: int = 4096
    time_per_token: bool = False

    def latent_size(self) -> tuple[int, int, int]:
        """Frames, rows and columns of the latents. ConfigError without a video."""
        if self.video is None:
            raise ConfigError(f"shape {self.name} has no video; only its operator can be measured")
        frames, rows, columns = self.spec.grid(*self.video)
        frame, row, column = self.spec.patch_size
        return frames * frame, rows * row, columns * column


def _model(name: str, title: str, spec: WanSpec, video: tuple[int, int, int], **options: Any) -> Shape:
    size = "×".join(map(str, video))
    return Shape(
        name=name, title=f"{title}, {size}", spec=spec, video=video, tokens=spec.tokens(*video), **options
    )  # fmt: skip


def _operator(tokens: int, heads: int, head_dim: int) -> Shape:
    spec = WanSpec(blocks=1, heads=heads, head_dim=head_dim, ffn_dim=4 * heads * head_dim)
    return Shape(name=f"n{tokens}", title=f"{heads} heads × {head_dim}", spec=spec, tokens=tokens)


SMALL = WanSpec(blocks=4, heads=4, head_dim=64, ffn_dim=512, text_tokens=64)
GPU_SHAPES = (
    _model("wan2.1-1.3b-480p", "Wan2.1 1.3B", MODELS["Wan2.1 1.3B"], (81, 480, 832)),
    _model("wan2.1-1.3b-320p", "Wan2.1 1.3B", MODELS["Wan2.1 1.3B"], (81, 320, 480)),
    _model("wan2.1-14b-720p", "Wan2.1 14B", MODELS["Wan2.1 / 2.2 14B"], (81, 720, 1280)),
    _model(
        "wan2.2-5b-704p", "Wan2.2 5B", MODELS["Wan2.2 TI2V 5B"], (81, 704, 1280), channels=48, time_per_token=True
    ),
)  # fmt: skip
CPU_SHAPES = (_model("small-2k", "4 blocks of 4 heads × 64", SMALL, (29, 256, 256), text_dim=64),)
SWEEP_SHAPES = {
    "cuda": tuple(_operator(1024 * 2**power, 12, 128) for power in range(8)),
    "cpu": tuple(_operator(512 * 2**power, 4, 64) for power in range(5)),
}
SWEEPS = {device: tuple(shape.name for shape in shapes) for device, shapes in SWEEP_SHAPES.items()}
"""Device type → names, from the shortest; N up to 128k on a GPU, 8k on the CPU."""


def choose_shapes(device: torch.device, names: Sequence[str]) -> dict[str, Shape]:
    """Of the device's shapes those that are named, all if none is. ConfigError for a name that it does not have."""
    kind = "cpu" if device.type == "cpu" else "cuda"
    known = {shape.name: shape for shape in (*(CPU_SHAPES if kind == "cpu" else GPU_SHAPES), *SWEEP_SHAPES[kind])}
    wanted = [name for each in names for name in (SWEEPS[kind] if each == SWEEP else [each])] or list(known)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"shape {name!r} does not exist on {kind}; expected some of {[SWEEP, *known]}")
    return {name: known[name] for name in wanted}


def dtype_of(device: torch.device) -> torch.dtype:
    """What is measured on a device: float32 on the CPU, bfloat16 elsewhere."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16
