"""What a command will cost, from configs alone: for --dry-run."""

from typing import Any

import torch

from ..cost import profile
from ..distillation import DistillConfig, plan_distillation
from ..finetuning import FinetuneConfig
from ..generation import GenerateConfig
from ..models.wan import WanSpec, read_wan
from ..pipelines import resolve_base
from ..rates import Rate
from ..recipe import RecipeConfig

GIB = 2**30


def distillation(base: str, rates: tuple[Rate, ...], config: DistillConfig, dtype: str) -> str:
    """Passes, memory, disk and teacher FLOPs of a distillation."""
    spec = read_wan(resolve_base(base))
    shape: dict[str, Any] = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    plan = plan_distillation(
        range(spec.blocks),
        rates,
        config,
        tokens=spec.tokens(**shape),
        heads=spec.heads,
        head_dim=spec.head_dim,
        element_size=getattr(torch, dtype).itemsize,
    )
    forward = profile(spec, **shape).total_flops
    work = plan.teacher_forwards * forward * config.batch_size
    return f"distill: {plan}; {_flops(work)} for the teacher's blocks"


def finetuning(base: str, config: FinetuneConfig) -> str:
    """Memory for weights and optimizer, disk for checkpoints, FLOPs of the blocks."""
    spec = read_wan(resolve_base(base))
    shape: dict[str, Any] = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    parameters = block_parameters(spec)
    state = 16 * parameters if config.trainable == "all" else 2 * parameters
    copies = 1 + (config.objective != "flow" and config.trainable == "all")
    passes = 4 if config.gradient_checkpointing else 3
    work = passes * profile(spec, **shape).total_flops * config.batch_size * config.max_steps
    checkpoint = (12 if config.trainable == "all" else 4) * parameters * config.keep_checkpoints
    return (
        f"finetune: {config.max_steps} steps of {config.batch_size} videos, at most {_flops(work)} in the blocks; "
        f"{(state + 2 * parameters * (copies - 1)) / GIB:.2f} GiB for the blocks' weights, gradients and optimizer, "
        f"beside activations; {checkpoint / GIB:.2f} GiB of disk for {config.keep_checkpoints} checkpoints"
    )


def generation(base: str, videos: int, config: GenerateConfig) -> str:
    """Transformer forwards and the FLOPs of its blocks, all softmax."""
    shape: dict[str, Any] = {"num_frames": config.num_frames, "height": config.height, "width": config.width}
    forwards = videos * config.num_inference_steps * (2 if config.guidance_scale > 1 else 1)
    work = forwards * profile(resolve_base(base), **shape).total_flops
    return f"generate: {videos} videos, {forwards} transformer forwards, at most {_flops(work)} in the blocks"


def recipe(config: RecipeConfig) -> str:
    """All stages of a run."""
    return "\n".join(
        (
            distillation(config.base, config.rates, config.distill, config.dtype),
            finetuning(config.base, config.finetune),
            f"three times {generation(config.base, config.num_samples, config.generate)}",
        )
    )


def block_parameters(spec: WanSpec) -> int:
    """Parameters of the transformer blocks: attention twice, feed-forward, modulation."""
    return spec.blocks * (8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim + 6 * spec.dim)


def _flops(value: float) -> str:
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e9:.2f} GFLOP"
