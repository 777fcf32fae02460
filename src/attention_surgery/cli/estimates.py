"""What a command will cost in compute, memory and disk, from configs alone: for --dry-run."""

import importlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch

from ..cost import profile
from ..distillation import DistillConfig, plan_distillation
from ..errors import ModelError
from ..evaluation import EvaluateConfig, estimate
from ..finetuning import FinetuneConfig, read_dataset
from ..generation import GenerateConfig
from ..models.wan import WanSpec, read_wan
from ..pipelines import resolve_base
from ..rates import Rate
from ..recipe import RecipeConfig

WEIGHTS = ("transformer", "text_encoder", "image_encoder", "vae")
TRAINED = 16  # bytes of a trained parameter: float32 value and gradient, and AdamW's two moments
KEPT = 12  # of them, those that a checkpoint holds
BITS_PER_PIXEL = 0.4  # of an H.264 file at the quality that is written; videos differ by several times
TEXT_TOKENS = 64  # of a caption, as it is cached without padding
ACTIVATIONS = {"bf16": 180, "no": 270}
"""Bytes per token and channel that the backward of one hybrid block holds, measured; "no" in float32."""
BOUNDARY = 4  # bytes per token and channel between two blocks, which gradient checkpointing holds of each


@dataclass(frozen=True)
class Base:
    """A pipeline as its configs describe it.

    Attributes:
        spec: of its transformer.
        parameters: of each component that has weights.
        latent_channels, text_dim: of the transformer's inputs.
    """

    spec: WanSpec
    parameters: dict[str, int]
    latent_channels: int
    text_dim: int

    def weights(self, dtype: str) -> str:
        """The memory of all weights, in words."""
        size = itemsize(dtype)
        sizes = {name.replace("_", " "): amount(size * count) for name, count in self.parameters.items()}
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        return f"{amount(size * sum(self.parameters.values()))} of weights in {dtype} ({listed})"


@cache
def read_base(base: str) -> Base:
    """Read the configs of a pipeline; its components are built on the meta device, where they have no weights."""
    import diffusers
    import transformers

    source = resolve_base(base)
    index = cast(dict[str, Any], diffusers.DiffusionPipeline.load_config(source))
    config: dict[str, Any] = {}
    parameters: dict[str, int] = {}
    for name in WEIGHTS:
        library, kind = index.get(name) or ("", None)
        if not kind:
            continue
        component = getattr(importlib.import_module(library), kind)
        with torch.device("meta"):
            if library == "diffusers":
                settings = cast(dict[str, Any], component.load_config(source, subfolder=name))
                config = settings if name == "transformer" else config
                model = component.from_config(settings)
            else:
                model = component(transformers.AutoConfig.from_pretrained(source, subfolder=name))
        parameters[name] = sum(parameter.numel() for parameter in model.parameters())
    if "transformer" not in parameters:
        raise ModelError(f"{base} has no transformer; expected a Wan pipeline in diffusers format")
    return Base(read_wan(source), parameters, config["in_channels"], config["text_dim"])


def profiling(base: str) -> str:
    """Of `profile`."""
    return f"profile: one block of {base} per rate is counted on the meta device: no weights, no disk"


def distillation(base: str, rates: tuple[Rate, ...], config: DistillConfig, dtype: str) -> str:
    """Passes, teacher FLOPs, memory and disk of `distill`."""
    model = read_base(base)
    spec, shape = model.spec, size_of(config)
    plan = plan_distillation(
        range(spec.blocks),
        rates,
        config,
        tokens=spec.tokens(**shape),
        heads=spec.heads,
        head_dim=spec.head_dim,
        element_size=itemsize(dtype),
    )
    work = plan.teacher_forwards * profile(spec, **shape).total_flops * config.batch_size
    return f"distill: {flops(work)} for the teacher's blocks; {plan}; {model.weights(dtype)}"


def selection(base: str, unit: str, shape: dict[str, int]) -> str:
    """Of `select`."""
    spec = read_wan(resolve_base(base))
    if unit == "flops":
        return "select: one block per rate is counted on the meta device; the maps are read; kilobytes of disk"
    block = 4 * block_parameters(spec) // spec.blocks + ACTIVATIONS["no"] * spec.tokens(**shape) * spec.dim
    return (
        f"select: one block per rate is timed on the device at hand, minutes; about {amount(block)} of memory beside "
        "the maps; kilobytes of disk"
    )


def conversion(base: str, *, dtype: str, degree: int = 2, layers: int = 2) -> str:
    """Of `convert`, if every block is converted."""
    model = read_base(base)
    maps = model.spec.blocks * map_parameters(model.spec, degree, layers)
    weights = itemsize(dtype) * model.parameters["transformer"]
    return (
        f"convert: seconds; {amount(weights)} of memory for the transformer in {dtype}; at most "
        f"{amount(itemsize(dtype) * maps)} of disk for the feature maps"
    )


def finetuning(
    base: str, config: FinetuneConfig, dtype: str, *, degree: int = 2, layers: int = 2, dataset: Path | None = None
) -> str:
    """FLOPs, memory and disk of `finetune`, if every block is converted."""
    model = read_base(base)
    spec, shape, size = model.spec, size_of(config), itemsize(dtype)
    base_parameters = model.parameters["transformer"]
    maps = spec.blocks * map_parameters(spec, degree, layers)
    adapters = spec.blocks * config.lora_rank * (18 * spec.dim + 2 * spec.ffn_dim)
    trained = {"all": base_parameters + maps, "phi": maps, "lora": maps + adapters}[config.trainable]
    frozen = size * (base_parameters + maps + (adapters if config.trainable == "lora" else 0) - trained)
    state = TRAINED * trained + frozen + (4 * trained if config.ema_decay else 0)
    teacher = 4 * base_parameters if config.objective != "flow" and config.trainable == "all" else 0
    micro = config.batch_size // config.gradient_accumulation_steps
    block = ACTIVATIONS["bf16"] if config.mixed_precision == "bf16" else ACTIVATIONS["no"] * size // 4
    held = block + BOUNDARY * spec.blocks if config.gradient_checkpointing else block * spec.blocks
    activations = micro * held * spec.tokens(**shape) * spec.dim
    passes = 4 if config.gradient_checkpointing else 3
    passes += config.objective != "flow"
    work = passes * profile(spec, **shape).total_flops * config.batch_size * config.max_steps
    frames, rows, columns = spec.grid(**shape)
    patch = spec.patch_size[0] * spec.patch_size[1] * spec.patch_size[2]
    cached = 4 * (frames * rows * columns * patch * model.latent_channels + TEXT_TOKENS * model.text_dim)
    kept = (config.keep_checkpoints + 1) * (KEPT * trained + frozen + (4 * trained if config.ema_decay else 0))
    videos = None if dataset is None else len(read_dataset(dataset, skip_bad=True))
    cache_disk = f"{amount(cached)} per video" if videos is None else f"{amount(videos * cached)} of {videos} videos"
    result = size * (base_parameters + maps)
    return (
        f"finetune: {config.max_steps} steps of {config.batch_size} videos, at most {flops(work)} in the blocks; "
        f"memory {amount(state + teacher)} for weights, gradients and optimizer, about {amount(activations)} for "
        f"activations, beside text encoder and VAE; disk {amount(kept)} for {config.keep_checkpoints} checkpoints and "
        f"one being written, about {cache_disk} for cached latents and text, {amount(result)} for the model"
    )


def generation(base: str, videos: int, config: GenerateConfig, dtype: str) -> str:
    """Transformer forwards, FLOPs of its blocks if all were softmax, memory and disk of `generate`."""
    model, shape = read_base(base), size_of(config)
    forwards = videos * config.num_inference_steps * (2 if config.guidance_scale > 1 else 1)
    work = forwards * profile(model.spec, **shape).total_flops
    disk = videos * config.num_frames * config.height * config.width * BITS_PER_PIXEL / 8
    return (
        f"generate: {videos} videos, {forwards} transformer forwards, at most {flops(work)} in the blocks; "
        f"{model.weights(dtype)}, beside activations; about {amount(disk)} of disk"
    )


def evaluation(base: str, config: EvaluateConfig, output: Path, dtype: str) -> str:
    """Videos, forwards, FLOPs, memory and disk of `evaluate`."""
    model, cost = read_base(base), estimate(config, output)
    work = cost.forwards * profile(model.spec, **size_of(config.resolved_sampling)).total_flops
    return f"{cost}; at most {flops(work)} in the blocks; {model.weights(dtype)}, beside activations"


def reporting(run: Path) -> str:
    """Of `report`: the page holds the run's videos, in base 64."""
    videos = sum(path.stat().st_size for path in (run / "videos").rglob("*.mp4"))
    return f"report: seconds; about {amount(4 / 3 * videos + 2**20)} of memory and disk"


def recipe(config: RecipeConfig) -> str:
    """All stages of a run."""
    phi: dict[str, Any] = {"degree": config.distill.degree, "layers": config.distill.layers}
    return "\n".join(
        (
            profiling(config.base),
            distillation(config.base, config.rates, config.distill, config.dtype),
            selection(config.base, config.unit, size_of(config.generate)),
            conversion(config.base, dtype=config.dtype, **phi),
            finetuning(config.base, config.finetune, config.dtype, **phi),
            f"three times {generation(config.base, config.num_samples, config.generate, config.dtype)}",
        )
    )


def size_of(config: Any) -> dict[str, Any]:
    """The video's size in a stage's settings."""
    return {name: getattr(config, name) for name in ("num_frames", "height", "width")}


def block_parameters(spec: WanSpec) -> int:
    """Parameters of the transformer blocks: attention twice, feed-forward, modulation."""
    return spec.blocks * (8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim + 6 * spec.dim)


def map_parameters(spec: WanSpec, degree: int, layers: int) -> int:
    """Parameters of one block's φ_q and φ_k."""
    features = degree * spec.head_dim
    inner = (layers - 1) * (features * features + features)
    return 2 * spec.heads * (spec.head_dim * features + features + inner)


def itemsize(dtype: str) -> int:
    """Bytes of an element."""
    return getattr(torch, dtype).itemsize


def amount(size: float) -> str:
    """Bytes in words."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= scale / 10:
            return f"{size / scale:.2f} {unit}"
    return f"{size / 2**10:.0f} KiB"


def flops(value: float) -> str:
    """Floating-point operations in words."""
    for unit, scale in (("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12)):
        if value >= scale:
            return f"{value / scale:.2f} {unit}"
    return f"{value / 1e9:.2f} GFLOP"
