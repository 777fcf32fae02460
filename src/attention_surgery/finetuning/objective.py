"""What fine-tuning minimises: flow matching on data, and the softmax teacher's velocity."""

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from ..models import HybridWanTransformer3DModel, disabled, revert_
from .compilation import OPTIONS
from .config import FinetuneConfig

Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(x_t b c f h w, σ b, text b l d) → velocity b c f h w."""


def sample_sigma(generator: torch.Generator, config: FinetuneConfig, shift: float) -> Tensor:
    """A noise level in (0, 1): t uniform or logit-normal, then σ = s·t / (1 + (s - 1)·t), as Wan was trained."""
    if config.timestep_sampling == "uniform":
        t = torch.rand((), generator=generator)
    else:
        t = torch.sigmoid(torch.randn((), generator=generator))
    return shift * t / (1 + (shift - 1) * t)


def timestep_shift(pipe: Any, config: FinetuneConfig) -> float:
    """`config.shift`, or that of the pipeline's scheduler."""
    if config.shift is not None:
        return config.shift
    scheduler = pipe.scheduler.config
    return float(scheduler.get("flow_shift", scheduler.get("shift", 1.0)))


def velocity_of(model: Any) -> Velocity:
    """The transformer as a function of noise level: its timestep is 1000 σ."""
    return lambda noisy, sigma, text: model(noisy, 1000 * sigma, text, return_dict=False)[0]


def teacher_velocity(model: HybridWanTransformer3DModel, config: FinetuneConfig) -> Velocity:
    """The softmax model that `model` was converted from, without gradient.

    Where the base weights stay frozen it is `model` itself with hybrid attention (and adapters) off; where all weights
    are trained it is a copy that is taken now, of one more model's memory.
    """
    if config.trainable == "all":
        frozen = copy.deepcopy(model)
        revert_(frozen)
        frozen.eval().requires_grad_(False)
        if config.compile:
            frozen.compile_repeated_blocks(**OPTIONS)
        return torch.no_grad()(velocity_of(frozen))

    @torch.no_grad()
    def velocity(noisy: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        with ExitStack() as stack:
            stack.enter_context(disabled(model))
            if config.trainable == "lora":
                model.disable_adapters()
                stack.callback(model.enable_adapters)
            return velocity_of(model)(noisy, sigma, text)

    return velocity


@torch.no_grad()
def first_bad_block(model: HybridWanTransformer3DModel, noisy: Tensor, sigma: Tensor, text: Tensor) -> int | None:
    """The first block whose output is not finite on these inputs; None if all are."""
    bad: list[int] = []

    def watch(index: int) -> Callable[[Any, Any, Tensor], None]:
        return lambda block, inputs, output: None if output.isfinite().all() else bad.append(index)

    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))  # hooks that look at numbers break graphs
        for index, block in enumerate(model.blocks):
            stack.callback(block.register_forward_hook(watch(index)).remove)
        velocity_of(model)(noisy, sigma, text)
    return min(bad, default=None)


def training_loss(
    student: Velocity,
    teacher: Velocity | None,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    text: Tensor,
    config: FinetuneConfig,
) -> Tensor:
    """Mean squared error of the velocity at x_t = (1 - σ) x_0 + σ ε against ε - x_0, the teacher's, or both."""
    level = sigma.view(-1, 1, 1, 1, 1)
    noisy = (1 - level) * latents + level * noise
    velocity = student(noisy, sigma, text).float()
    loss = velocity.new_zeros(())
    if config.objective in ("flow", "both"):
        loss = loss + (velocity - (noise - latents)).square().mean()
    if teacher is not None:
        weight = config.teacher_weight if config.objective == "both" else 1.0
        loss = loss + weight * (velocity - teacher(noisy, sigma, text).float()).square().mean()
    return loss
