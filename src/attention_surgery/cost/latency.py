"""Seconds that one transformer block takes at each rate, measured side by side on the device at hand."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from diffusers.models.attention_dispatch import AttentionBackendName

from ..errors import ConfigError
from ..models.wan import WanSpec
from ..ops.tokens import Grid
from ..progress import progress
from ..rates import Normalizer, Pattern, Rate, check_normalizer, check_pattern
from .flops import block_inputs, build_block, build_processor

MIN_ROUNDS = 3


@dataclass(frozen=True, kw_only=True)
class LatencyConfig:
    """How block latency is measured.

    Args:
        device: a torch device; "auto" is the accelerator at hand, or the CPU where there is none.
        dtype: "auto" is bfloat16 on an accelerator and float32 on the CPU.
        rounds: measurements of each rate.
        warmup: rounds before them that do not count.
        max_seconds: no further round begins after this time, once there are one to warm up and three that count.
        normalizer, pattern: of the hybrid layers.
        attention_backend: diffusers attention backend of all softmax parts; None for the active one.

    Raises:
        ConfigError: an option outside its range.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    rounds: int = 30
    warmup: int = 3
    max_seconds: float = 120.0
    normalizer: Normalizer = "mean"
    pattern: Pattern = "stride"
    attention_backend: str | None = None

    def __post_init__(self) -> None:
        if self.dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ConfigError(f"dtype {self.dtype!r} is not timed; expected 'auto', 'float32', 'bfloat16' or 'float16'")
        for name, value, least in (("rounds", self.rounds, MIN_ROUNDS), ("warmup", self.warmup, 1)):
            if not isinstance(value, int) or value < least:
                raise ConfigError(f"{name} is {value!r}; expected an integer >= {least}")
        if not (math.isfinite(self.max_seconds) and self.max_seconds > 0):
            raise ConfigError(f"max_seconds is {self.max_seconds}; expected a number above 0")
        check_normalizer(self.normalizer)
        check_pattern(self.pattern)
        names = [name.value for name in AttentionBackendName]
        if self.attention_backend is not None and self.attention_backend not in names:
            raise ConfigError(f"attention_backend {self.attention_backend!r} does not exist; expected one of {names}")

    def resolve_device(self) -> torch.device:
        """The device that is measured. ConfigError if there is no such device."""
        if self.device == "auto":
            return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        try:
            device = torch.device(self.device)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {self.device!r} cannot be used: {error}") from error
        if device.type == "meta":
            raise ConfigError("device 'meta' takes no time; expected one that computes")
        return device

    def resolve_dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that is measured on `device`."""
        if self.dtype == "auto":
            return torch.float32 if device.type == "cpu" else torch.bfloat16
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.dtype]


@torch.inference_mode()
def block_latency(
    spec: WanSpec, rates: Sequence[Rate], grid: Grid, *, degree: int = 2, layers: int = 2, config: LatencyConfig
) -> dict[Rate, float]:
    """Seconds of one forward of one block with random weights at each rate, one sample, as the processors run eagerly.

    The rates take turns within each round, so that a machine that slows down or speeds up does so for all of them, and
    each rate's time is taken as a share of its round (see `settle`).
    """
    device = config.resolve_device()
    dtype = config.resolve_dtype(device)
    tokens = grid[0] * grid[1] * grid[2]
    options = {"degree": degree, "layers": layers, "normalizer": config.normalizer, "pattern": config.pattern}
    with _own_random_numbers(device), torch.device(device):
        block = build_block(spec, backend=config.attention_backend).to(dtype).eval()
        processors = {rate: build_processor(spec, rate, backend=config.attention_backend, **options) for rate in rates}
        inputs = block_inputs(spec, tokens, device=device, dtype=dtype)
    for rate, processor in processors.items():
        if rate != 1:
            processor.to(dtype).grid = grid

    def run(rate: Rate) -> float:
        block.attn1.set_processor(processors[rate])
        return seconds(lambda: block(*inputs), device)

    start = time.monotonic()
    rounds: list[list[float]] = []
    with progress("timing one block", config.warmup + config.rounds) as advance:
        for done in range(config.warmup + config.rounds):
            if done > MIN_ROUNDS and time.monotonic() - start > config.max_seconds:
                break
            rounds.append([run(rate) for rate in rates])
            advance("")
    cold = min(config.warmup, len(rounds) - MIN_ROUNDS)
    return dict(zip(rates, settle(rounds[cold:]), strict=True))


def _own_random_numbers(device: torch.device) -> AbstractContextManager[None]:
    """Within the context random numbers may be drawn without changing what the caller draws later."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock seconds of one call, with everything before it done and all of it finished."""
    synchronize = (lambda: None) if device.type == "cpu" else (lambda: torch.accelerator.synchronize(device))
    synchronize()
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def settle(rounds: Sequence[Sequence[float]]) -> list[float]:
    """One time per column: the median of its share of each round, times the median round.

    The median of each column by itself would compare one rate's time on a busy machine with another's on an idle one.
    """
    times = np.asarray(rounds, dtype=float)
    totals = times.sum(axis=1, keepdims=True)
    return (np.median(times / totals, axis=0) * np.median(totals)).tolist()
