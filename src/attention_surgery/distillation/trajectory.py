"""Teacher trajectories: the reverse diffusion of Algorithm 1, line 3, with an observer at every step."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..models.wan import pipeline_grid
from .config import DistillConfig


def stochastic_euler(scheduler: Any) -> FlowMatchEulerDiscreteScheduler:
    """The flow-matching form of A.1's Euler ancestral scheduler, with the timestep shift of the pipeline's own."""
    shift = scheduler.config.get("flow_shift", scheduler.config.get("shift", 1.0))
    return FlowMatchEulerDiscreteScheduler(shift=shift, stochastic_sampling=True)


def run_teacher(
    pipe: Any, prompts: Sequence[str], *, seed: int, config: DistillConfig, on_step_end: Callable[[int], None]
) -> None:
    """Sample latents for `prompts` in one batch; call `on_step_end(step)` after each denoising step, gradients enabled.

    The noise depends on `seed` only. The pipeline's scheduler, progress bar and the global random state are put back.
    """

    def callback(_pipe: Any, step: int, _timestep: Any, _kwargs: dict[str, Any]) -> dict[str, Any]:
        with torch.enable_grad():
            on_step_end(step)
        return {}

    devices = [pipe._execution_device] if pipe._execution_device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _quiet(pipe, stochastic_euler(pipe.scheduler)):
        torch.manual_seed(seed)
        pipe(
            prompt=list(prompts),
            negative_prompt=config.negative_prompt,
            num_frames=config.num_frames,
            height=config.height,
            width=config.width,
            num_inference_steps=config.num_inference_steps,
            guidance_scale=config.guidance_scale,
            max_sequence_length=config.max_sequence_length,
            generator=torch.Generator("cpu").manual_seed(seed),
            output_type="latent",
            callback_on_step_end=callback,
        )


def token_grid(pipe: Any, config: DistillConfig) -> tuple[int, int, int]:
    """Frames, rows and columns of a trajectory's tokens. ConfigError for a video size that the model does not take."""
    return pipeline_grid(pipe, num_frames=config.num_frames, height=config.height, width=config.width)


@contextmanager
def _quiet(pipe: Any, scheduler: FlowMatchEulerDiscreteScheduler) -> Any:
    own, bar = pipe.scheduler, getattr(pipe, "_progress_bar_config", {})
    pipe.scheduler = scheduler
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        pipe.scheduler = own
        pipe.set_progress_bar_config(**bar)
