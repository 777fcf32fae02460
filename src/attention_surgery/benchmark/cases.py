"""What is timed against what: a plan per device, whose steps become cases in order of importance."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .config import BenchmarkConfig
from .shapes import SWEEPS, Shape, choose_shapes
from .variants import (
    Variant,
    dense_kernels,
    mean_in_pytorch,
    own_max,
    own_mean,
    own_staggered,
    paper_in_pytorch,
)

Scope = Literal["op", "block", "transformer", "rates"]
Kind = Callable[[Sequence[int], torch.device], tuple[Variant, ...]]
"""Variants for rates on a device."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Variants that take turns, so that their ratios hold whatever the machine does meanwhile.

    Args:
        scope: the attention operator with φ, one transformer block, the whole transformer, or the whole transformer at
            rates chosen by latency and by FLOPs.
        shape: model and video.
        backward: forward and backward, without an optimizer; the transformer with gradient checkpointing.
        compiled: whether blocks are compiled, `compile_repeated_blocks(fullgraph=True)`.
        graphed: whether the operator runs as a CUDA graph, so that the time of launching kernels does not count.
        variants: what is set side by side. Unless dense attention is among them, the fastest kernels join: of all for
            the operator, of diffusers' for models.
        seconds: how long rounds go on, once there are enough of them; about what the case takes on a large GPU, or on
            two cores.
        number: place in the plan.
    """

    scope: Scope
    shape: Shape
    variants: tuple[Variant, ...]
    backward: bool = False
    compiled: bool = False
    graphed: bool = False
    seconds: float = 4.0
    number: int = 0

    @property
    def name(self) -> str:
        """A line of the plan."""
        passes = "forward + backward" if self.backward else "forward"
        mode = ", compiled" if self.compiled else ", eager"
        if self.scope == "op":
            mode = ", as a CUDA graph" if self.graphed else ""
        return f"{self.scope}, {self.shape.name}, {passes}{mode}"


@dataclass(frozen=True)
class Step:
    """A case for each of `shapes`; with `highest` at the highest rate alone."""

    scope: Scope
    shapes: tuple[str, ...]
    kinds: tuple[Kind, ...] = (own_mean,)
    backward: bool = False
    compiled: bool = False
    graphed: bool = False
    seconds: float = 4.0
    highest: bool = False


T2V_480, T2V_320, T2V_14B, TI2V_5B = "wan2.1-1.3b-480p", "wan2.1-1.3b-320p", "wan2.1-14b-720p", "wan2.2-5b-704p"
SHORT = SWEEPS["cuda"][:5]
"""Where launching an operator's kernels can take longer than running them."""
GPU_PLAN = (
    Step("op", (T2V_480,), (dense_kernels, own_mean, own_max), seconds=12),
    Step("op", (T2V_480,), (dense_kernels, own_mean, own_max), backward=True, seconds=16),
    Step("transformer", (T2V_480, TI2V_5B), compiled=True, seconds=18),
    Step("op", (T2V_480,), (own_staggered, paper_in_pytorch, mean_in_pytorch), seconds=6),
    Step("transformer", (T2V_480,), compiled=True, backward=True, seconds=30),
    Step("rates", (T2V_480,), seconds=20),
    Step("op", (TI2V_5B, T2V_320, T2V_14B), seconds=3),
    Step("op", SWEEPS["cuda"], seconds=1),
    Step("op", (T2V_320, *SHORT), graphed=True, seconds=1),
    Step("block", (T2V_480, TI2V_5B, T2V_14B), compiled=True, seconds=3),
    Step("block", (T2V_480,), compiled=True, backward=True, seconds=4),
    Step("transformer", (T2V_320,), compiled=True, seconds=4),
    Step("transformer", (T2V_480, TI2V_5B), seconds=12),
    Step("op", (T2V_480,), (own_staggered, paper_in_pytorch, mean_in_pytorch), backward=True, seconds=5, highest=True),
    Step("op", (TI2V_5B, T2V_320), backward=True, seconds=2),
    Step("op", SWEEPS["cuda"][:-1], backward=True, seconds=2),
    Step("op", (T2V_320, *SHORT), backward=True, graphed=True, seconds=1),
    Step("block", (T2V_480, TI2V_5B), seconds=3),
    Step("transformer", (T2V_320,), compiled=True, backward=True, seconds=10),
    Step("block", (T2V_480,), backward=True, seconds=4),
    Step("block", (T2V_320,), compiled=True, seconds=3),
    Step("transformer", (T2V_320,), seconds=4),
    Step("op", (T2V_14B, SWEEPS["cuda"][-1]), backward=True, seconds=20),
    Step("block", (T2V_14B,), seconds=10),
    Step("transformer", (TI2V_5B,), compiled=True, backward=True, seconds=60),
    Step("transformer", (T2V_480,), backward=True, seconds=60),
)

TARGET, SMALL = "n8192", "small-2k"
CPU_PLAN = (
    Step("op", (TARGET,), (dense_kernels, own_mean), seconds=15),
    Step("op", (TARGET,), (dense_kernels, own_mean), backward=True, seconds=40),
    Step("op", (TARGET,), (own_max, own_staggered), seconds=10, highest=True),
    Step("op", SWEEPS["cpu"][:-1], seconds=2),
    Step("block", (SMALL,), seconds=3),
    Step("transformer", (SMALL,), seconds=6),
    Step("transformer", (SMALL,), backward=True, seconds=20, highest=True),
    Step("rates", (SMALL,), seconds=15),
    Step("op", SWEEPS["cpu"][:-1], backward=True, seconds=2),
    Step("block", (SMALL,), compiled=True, seconds=3, highest=True),
    Step("transformer", (SMALL,), compiled=True, seconds=6, highest=True),
)


def plan_cases(config: BenchmarkConfig, device: torch.device) -> list[Case]:
    """Every case that `config` asks for, the most important first. ConfigError for a shape that there is not."""
    shapes = choose_shapes(device, config.shapes)
    cases = []
    for step in CPU_PLAN if device.type == "cpu" else GPU_PLAN:
        level = "training" if step.backward else "forward" if step.scope == "transformer" else step.scope
        if config.measures(level):
            rates = (max(config.rates),) if step.highest else config.rates
            cases += [_case(step, shapes[name], rates, device) for name in step.shapes if name in shapes]
    return [replace(case, number=number) for number, case in enumerate(cases, start=1)]


def _case(step: Step, shape: Shape, rates: tuple[int, ...], device: torch.device) -> Case:
    variants = dict.fromkeys(variant for kind in step.kinds for variant in kind(rates, device))
    if step.scope != "op":
        variants = {replace(variant, compiled=step.compiled): None for variant in variants}
    elif step.graphed:
        variants = {replace(variant, graphed=True): None for variant in variants}
    return Case(
        scope=step.scope,
        shape=shape,
        variants=tuple(variants),
        backward=step.backward,
        compiled=step.compiled,
        graphed=step.graphed,
        seconds=step.seconds,
    )
