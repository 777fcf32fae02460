"""What a benchmark measures, and for how long."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal, get_args

from ..errors import ConfigError
from ..rates import check_rates

Level = Literal["op", "block", "forward", "training", "rates"]
LEVELS: tuple[Level, ...] = get_args(Level)
Kernel = Literal["native", "_native_cudnn", "_native_flash", "flash", "_flash_3", "flash_4_hub"]
KERNELS: tuple[Kernel, ...] = get_args(Kernel)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Settings of a benchmark. The preset that belongs to the device is measured unless a part of it is named.

    Args:
        device: a torch device; auto takes a GPU if there is one, with its full preset, and otherwise the small preset
            of the CPU.
        levels: op (attention with φ), block, forward (the whole transformer), training (forward + backward of all
            three), rates (rates chosen by latency against rates chosen by FLOPs). All if none is named.
        shapes: names as --dry-run lists them. All if none is named.
        rates: R of the hybrid layers.
        minutes: a case that would not end within this time is listed as not measured. Cases come in order of
            importance.
        workers: processes that check and compile beforehand; 0 is up to 8 on a GPU and none, in this one, on the CPU.
        threads: of the CPU, for its preset; 0 is as many as PyTorch takes. On a busy machine fewer than its cores are
            steadier.
        kernel: diffusers attention backend of the hybrid's softmax part; the fastest at its rate if none is given.
        bank: distilled maps whose errors the level rates takes; a declared formula if none is given.

    Raises:
        ConfigError: an option outside its range.
        RateError: a rate below 2.
    """

    device: str = "auto"
    levels: tuple[Level, ...] = ()
    shapes: tuple[str, ...] = ()
    rates: tuple[int, ...] = (2, 4, 8)
    minutes: float = 7.5
    workers: int = 0
    threads: int = 0
    kernel: Kernel | None = None
    bank: Path | None = None

    def __post_init__(self) -> None:
        for level in self.levels:
            if level not in LEVELS:
                raise ConfigError(f"level {level!r} does not exist; expected some of {LEVELS}")
        if 1 in check_rates(self.rates) or "linear" in self.rates:
            raise ConfigError(f"rates are {self.rates}; expected integers >= 2: softmax, the baseline, is always there")
        if not (math.isfinite(self.minutes) and self.minutes > 0):
            raise ConfigError(f"minutes is {self.minutes}; expected a number above 0")
        if self.kernel is not None and self.kernel not in KERNELS:
            raise ConfigError(f"kernel {self.kernel!r} does not exist; expected one of {KERNELS}")
        for name in ("workers", "threads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; expected an integer >= 0")

    def measures(self, level: Level) -> bool:
        """Whether `level` is wanted."""
        return not self.levels or level in self.levels

    def command(self) -> str:
        """The command that asks for these settings, without the places that it reads and writes."""
        words = ["attention-surgery benchmark"]
        for field in fields(self):
            value = getattr(self, field.name)
            if value != field.default and field.name != "bank":
                listed = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name}", *map(str, listed)]
        return " ".join(words)
