"""Light fine-tuning of a converted model (§3.3): the whole recipe, top to bottom.

A run folder holds `config.json`, `log.jsonl`, `cache/`, `checkpoints/step-…/`, `validation/step-…/` and, for LoRA,
`lora/`.
"""

import dataclasses
import json
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor

from ..checkpoint.identity import weights_digest
from ..errors import ConfigError, DataError, DivergenceError, ModelError
from ..files import append_jsonl, digest, write_json
from ..generation import GenerateConfig, generate, write_video
from ..models import HybridWanTransformer3DModel, hybrid_processors
from ..models.wan import pipeline_grid
from ..processes import join_processes
from ..progress import progress
from .cache import LatentCache
from .compilation import compiled_blocks
from .config import FinetuneConfig
from .dataset import Entry, read_dataset
from .objective import first_bad_block, sample_sigma, teacher_velocity, timestep_shift, training_loss, velocity_of
from .state import check_folder, load_checkpoint, save_checkpoint, trim_log

LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
HELDOUT_LEVELS = 4


def finetune(
    pipe: Any,
    dataset: str | Path,
    *,
    config: FinetuneConfig | None = None,
    output_dir: str | Path,
    resume: bool = False,
    cache_dir: str | Path | None = None,
) -> None:
    """Train `pipe.transformer`, a converted model, in place on (video, caption) pairs.

    Runs under `accelerate launch` on any number of processes: order, noise and timesteps belong to the sample, so the
    result does not depend on how many there are, up to rounding. It resumes exactly: weights, optimizer, averages and
    position in the data.

    Args:
        pipe: a pipeline whose transformer `convert_` has made hybrid; its encoders make the latents.
        dataset: folder of videos with captions (see `read_dataset`).
        config: see `FinetuneConfig`.
        output_dir: run folder.
        resume: go on in `output_dir` from its last checkpoint, with the same settings, videos and first weights.
        cache_dir: of the latents and text embeddings, which several runs may share; None is `output_dir`/cache.

    Raises:
        ModelError: the transformer is not converted.
        ConfigError: a video size that the model does not take, or a tracker that is not installed.
        DataError: the dataset cannot be used, or has no video beside the held-out ones. Only latents are written then.
        RunError: `output_dir` is in use, was made with other settings, or a checkpoint cannot be written.
        CheckpointError: the checkpoint to go on from is damaged.
        DivergenceError: a loss or gradient that is not finite; names the block, the step and the videos. The last
            checkpoint stands.
    """
    config = config or FinetuneConfig()
    folder, model = Path(output_dir), pipe.transformer
    if not isinstance(model, HybridWanTransformer3DModel):
        raise ModelError(f"the transformer is a stock {type(model).__name__}; convert_ it before fine-tuning")
    pipeline_grid(pipe, num_frames=config.num_frames, height=config.height, width=config.width)
    _check_trackers(config)
    entries = read_dataset(dataset, skip_bad=config.skip_bad)
    if len(entries) <= config.heldout_videos:
        raise DataError(f"{dataset} holds {len(entries)} videos, of which {config.heldout_videos} are held out")
    join_processes(cpu=pipe._execution_device.type == "cpu")
    accelerator = Accelerator(
        mixed_precision="no",  # autocast below, so that one process can run several fine-tunings
        log_with=list(config.trackers) or None,
        project_dir=str(folder / "trackers"),
        cpu=pipe._execution_device.type == "cpu",
    )
    micro = config.batch_size // config.gradient_accumulation_steps
    if micro % accelerator.num_processes:
        raise DataError(f"micro-batches of {micro} videos do not split over {accelerator.num_processes} processes")
    settings = json.loads(json.dumps(_settings(model, config, dataset, entries)))
    if accelerator.is_main_process:
        check_folder(folder, settings, resume)
    accelerator.wait_for_everyone()

    cache = LatentCache(Path(cache_dir or folder / "cache"), pipe, entries, config)
    count = len(cache) - config.heldout_videos
    if count < 1:
        raise DataError(f"only {len(cache)} usable videos are left, of which {config.heldout_videos} are held out")
    if both := set(cache.files[:count]) & set(cache.files[count:]):
        names = [entry.path.name for entry, file in zip(cache.entries, cache.files, strict=True) if file in both]
        raise DataError(f"{names} are the same video and caption, held out and trained on; remove repeats")
    if accelerator.is_main_process and not (folder / "config.json").exists():
        write_json(folder / "config.json", settings)
    if config.trackers:
        accelerator.init_trackers("attention-surgery", config={k: str(v) for k, v in vars(config).items()})
    shift = timestep_shift(pipe, config)
    parameters = prepare_parameters_(model, config)
    teacher = None if config.objective == "flow" else teacher_velocity(model, config)
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=config.weight_decay)
    wrapped, optimizer = accelerator.prepare(model.train(), optimizer)
    ema = EMAModel(parameters, decay=config.ema_decay) if config.ema_decay else None
    step = load_checkpoint(accelerator, folder, ema) if resume else 0
    log = folder / "log.jsonl"
    if accelerator.is_main_process:
        trim_log(log, step)

    def record(**row: Any) -> None:
        if accelerator.is_main_process:
            append_jsonl(log, {"step": step, **row})
            accelerator.log({name: value for name, value in row.items() if isinstance(value, int | float)}, step=step)

    def evaluate() -> None:
        """Held-out loss, and validation videos, with the averaged weights if there are any."""
        due = config.validate_every and step % config.validate_every == 0
        if step % config.evaluate_every and step != config.max_steps and not due:
            return
        model.eval()
        if ema is not None:
            ema.store(parameters)
            ema.copy_to(parameters)
        if step % config.evaluate_every == 0 or step == config.max_steps:
            heldout = _heldout_loss(accelerator, wrapped, teacher, cache, count, shift, config)
            if not math.isfinite(heldout):
                raise DivergenceError(
                    f"the held-out loss is {heldout} at step {step}; the last checkpoint stands: lower lr ({config.lr})"
                )
            record(heldout_loss=heldout)
        if due and accelerator.is_main_process:
            _validate(pipe, config, folder / "validation" / f"step-{step:07d}")
        accelerator.wait_for_everyone()
        if ema is not None:
            ema.restore(parameters)
        model.train()

    compiled = compiled_blocks(model) if config.compile else nullcontext()
    with compiled, progress("fine-tune", config.max_steps, done=step) as advance:
        while step < config.max_steps:
            evaluate()
            start = time.monotonic()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup_steps))
            total = torch.zeros((), device=accelerator.device)
            names: list[str] = []
            for part in range(config.gradient_accumulation_steps):
                first = step * config.batch_size + part * micro
                mine = range(first + accelerator.process_index, first + micro, accelerator.num_processes)
                names += [cache.entries[_position(j, count, config.seed)].path.name for j in mine]
                batch = [_sample(cache, j, count, shift, config) for j in mine]
                latents, noise, sigma, text = (
                    torch.stack(tensors).to(accelerator.device) for tensors in zip(*batch, strict=True)
                )
                with _autocast(accelerator, config):
                    loss = training_loss(velocity_of(wrapped), teacher, latents, noise, sigma, text, config)
                if not torch.isfinite(accelerator.gather(loss.detach())).all():  # type: ignore[arg-type]
                    level = sigma.view(-1, 1, 1, 1, 1)
                    with _autocast(accelerator, config):
                        block = first_bad_block(model, (1 - level) * latents + level * noise, sigma, text)
                    raise DivergenceError(
                        f"the loss is {loss.item()} ({'the blocks are finite' if block is None else f'block {block}'}) "
                        f"at step {step}, batch of {names}; the last checkpoint stands: lower lr ({config.lr})"
                    )
                last = part == config.gradient_accumulation_steps - 1
                wrapped.require_backward_grad_sync = last
                accelerator.backward(loss / config.gradient_accumulation_steps)
                total += loss.detach() / config.gradient_accumulation_steps
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            if not torch.isfinite(norm):
                bad = [n for n, p in model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
                raise DivergenceError(
                    f"the gradient of {', '.join(bad[:3]) or 'all weights together'} is not finite at step {step}, "
                    f"batch of {names}; the last checkpoint stands: lower lr ({config.lr})"
                )
            torch.nn.utils.clip_grads_with_norm_(parameters, config.max_grad_norm, norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if ema is not None:
                ema.step(parameters)
            step += 1
            mean = accelerator.reduce(total, "mean").item()  # type: ignore[union-attr]
            seconds = round(time.monotonic() - start, 3)
            record(loss=mean, gradient_norm=float(norm), lr=optimizer.param_groups[0]["lr"], seconds=seconds)
            if step % config.checkpoint_every == 0 or step == config.max_steps:
                save_checkpoint(accelerator, folder, step, ema, config.keep_checkpoints)
            advance(f"loss {mean:.4f}")
        evaluate()
    if ema is not None:
        ema.copy_to(parameters)
    for tracker in accelerator.trackers:
        tracker.finish()
    model.eval()
    if config.gradient_checkpointing:
        model.disable_gradient_checkpointing()
    if config.trainable == "lora":
        if accelerator.is_main_process:
            type(pipe).save_lora_weights(folder / "lora", transformer_lora_layers=get_peft_model_state_dict(model))
        model.fuse_lora()
        model.unload_lora()


def prepare_parameters_(model: HybridWanTransformer3DModel, config: FinetuneConfig) -> list[torch.nn.Parameter]:
    """Freeze all but what `config.trainable` names, hold that in float32, and return it.

    peft freezes every other parameter when it adds adapters, φ among them: φ is thawed after that.
    """
    model.requires_grad_(config.trainable == "all")
    if config.trainable == "lora":
        model.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=LORA_TARGETS))
    for processor in hybrid_processors(model).values():
        processor.requires_grad_(True)
    if config.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    return parameters


def _check_trackers(config: FinetuneConfig) -> None:
    """accelerate leaves out trackers that are not installed, without a word."""
    installed = [str(tracker) for tracker in get_available_trackers()]
    if missing := [name for name in config.trackers if name not in installed]:
        raise ConfigError(
            f"trackers {missing} are not installed here, {installed} are: pip install 'attention-surgery[trackers]'"
        )


def _settings(
    model: HybridWanTransformer3DModel, config: FinetuneConfig, dataset: str | Path, entries: Sequence[Entry]
) -> dict[str, Any]:
    return {
        "hybrid": model.hybrid_config.to_dict(),
        "base": digest({name: str(value) for name, value in model.config.items() if not name.startswith("_")}),
        "weights": weights_digest(model),
        "dataset": str(Path(dataset).resolve()),
        "videos": digest([[entry.path.name, entry.caption] for entry in entries]),
        **dataclasses.asdict(config),
    }


def _autocast(accelerator: Accelerator, config: FinetuneConfig) -> torch.autocast:
    return torch.autocast(accelerator.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16")


def _position(sample: int, count: int, seed: int) -> int:
    """Which video sample number `sample` of the endless stream is: each epoch is a permutation of its own."""
    epoch, place = divmod(sample, count)
    generator = torch.Generator().manual_seed(int(digest([seed, "order", epoch])[:12], 16))
    return int(torch.randperm(count, generator=generator)[place])


def _sample(
    cache: LatentCache, sample: int, count: int, shift: float, config: FinetuneConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, noise, σ and text of one sample of the stream, the same in every run and on every process."""
    generator = torch.Generator().manual_seed(int(digest([config.seed, "noise", sample])[:12], 16))
    latents, text = cache[_position(sample, count, config.seed)]
    if torch.rand((), generator=generator) < config.caption_dropout:
        text = cache.empty
    sigma = sample_sigma(generator, config, shift)
    return latents, torch.randn(latents.shape, generator=generator), sigma, text


@torch.no_grad()
def _heldout_loss(
    accelerator: Accelerator,
    model: Any,
    teacher: Any,
    cache: LatentCache,
    count: int,
    shift: float,
    config: FinetuneConfig,
) -> float:
    """Mean loss over the held-out videos at fixed noises and noise levels; every process computes its share."""
    jobs = [(index, level) for index in range(count, len(cache)) for level in range(HELDOUT_LEVELS)]
    total = torch.zeros((), device=accelerator.device)
    for index, level in jobs[accelerator.process_index :: accelerator.num_processes]:
        generator = torch.Generator().manual_seed(int(digest([config.seed, "heldout", index, level])[:12], 16))
        latents, text = cache[index]
        t = (level + 0.5) / HELDOUT_LEVELS
        sigma = torch.tensor([shift * t / (1 + (shift - 1) * t)], device=accelerator.device)
        noise = torch.randn(latents.shape, generator=generator)[None].to(accelerator.device)
        batch = (latents[None].to(accelerator.device), noise, sigma, text[None].to(accelerator.device))
        with _autocast(accelerator, config):
            total += training_loss(velocity_of(model), teacher, *batch, config)
    return accelerator.reduce(total, "sum").item() / len(jobs)  # type: ignore[union-attr]


def _validate(pipe: Any, config: FinetuneConfig, folder: Path) -> None:
    """Sample the validation prompts as the model stands, seed i for prompt i."""
    settings = GenerateConfig(
        num_frames=config.num_frames,
        height=config.height,
        width=config.width,
        num_inference_steps=config.validation_steps,
        guidance_scale=config.validation_guidance,
        negative_prompt="",
        fps=config.fps,
        max_sequence_length=config.max_sequence_length,
    )
    pipe.set_progress_bar_config(disable=True)
    for index, prompt in enumerate(config.validation_prompts):
        (video,) = generate(pipe, [prompt], [index], config=settings)
        write_video(folder / f"{index:03d}.mp4", video, fps=config.fps)
