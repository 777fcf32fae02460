"""Settings of the fine-tuning (§3.3, A.1)."""

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """How a converted model is recovered. Defaults are the paper's where it says them.

    Args:
        lr: AdamW's learning rate.
        batch_size: videos per optimizer step, over all processes and accumulated micro-batches.
        max_steps: optimizer steps.
        trainable: "all" parameters, the feature maps ("phi"), or LoRA adapters with the feature maps ("lora").
        objective: "flow" matches data as Wan was trained, "teacher" matches the softmax model's velocity, "both" adds
            the second with `teacher_weight`.
        teacher_weight: of the teacher's part in objective "both".
        gradient_accumulation_steps: micro-batches per optimizer step.
        gradient_checkpointing: recompute each block in the backward.
        compile: compile the transformer's blocks with PyTorch's Inductor; each rate once, when it is first met.
        mixed_precision: "bf16" computes in bfloat16 on float32 weights; "no" in the weights' own precision.
        weight_decay: AdamW's.
        max_grad_norm: longer gradients are cut to it.
        warmup_steps: over which the rate rises to `lr`; it is constant after them.
        ema_decay: of averaged weights, which then are the result; 0 for none.
        caption_dropout: share of samples trained with the empty caption, for classifier-free guidance.
        timestep_sampling: of t before the shift, "uniform" or "logit_normal".
        shift: of the timesteps towards noise; None takes the pipeline scheduler's.
        lora_rank: of the adapters on attention and feed-forward layers.
        num_frames: frames that are taken of every video; Wan wants 4k + 1.
        height: pixels that videos are scaled to and cropped at.
        width: pixels, likewise.
        fps: frames per second that videos are brought to.
        max_sequence_length: text tokens, as the pipeline pads them.
        skip_bad: leave out videos that cannot be used, with a warning that counts them, instead of stopping.
        heldout_videos: videos at the end of the list that are never trained on; the held-out loss is measured on them.
        evaluate_every: steps between two measurements of the held-out loss, which is also taken at step 0 and the end.
        validation_prompts: sampled at step 0 and every `validate_every` steps.
        validate_every: steps between two validations; 0 for never.
        validation_steps: denoising steps of a validation video.
        validation_guidance: classifier-free guidance of a validation video.
        checkpoint_every: steps between two checkpoints.
        keep_checkpoints: how many of the last are kept.
        trackers: accelerate's trackers beside the JSONL log, such as "tensorboard" or "wandb".
        seed: of order, noise and timesteps, which do not depend on the number of processes.

    Raises:
        ConfigError: an option outside its range.
    """

    lr: float = 1e-5  # A.1
    batch_size: int = 16  # A.1
    max_steps: int = 1000  # A.1
    trainable: Literal["all", "phi", "lora"] = "all"  # A.1
    objective: Literal["flow", "teacher", "both"] = "flow"  # §3.3
    teacher_weight: float = 1.0
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    compile: bool = False
    mixed_precision: Literal["bf16", "no"] = "bf16"  # A.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    warmup_steps: int = 0
    ema_decay: float = 0.0
    caption_dropout: float = 0.1
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    shift: float | None = None
    lora_rank: int = 32
    num_frames: int = 81  # §4
    height: int = 480  # §4
    width: int = 832  # §4
    fps: int = 16
    max_sequence_length: int = 512
    skip_bad: bool = False
    heldout_videos: int = 2
    evaluate_every: int = 100
    validation_prompts: tuple[str, ...] = ()
    validate_every: int = 0
    validation_steps: int = 50
    validation_guidance: float = 5.0
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    trackers: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        for name, choices in {
            "trainable": ("all", "phi", "lora"),
            "objective": ("flow", "teacher", "both"),
            "mixed_precision": ("bf16", "no"),
            "timestep_sampling": ("uniform", "logit_normal"),
        }.items():
            if getattr(self, name) not in choices:
                raise ConfigError(f"{name} {getattr(self, name)!r} does not exist; expected one of {choices}")
        positive = ("lr", "batch_size", "max_steps", "gradient_accumulation_steps", "max_grad_norm", "lora_rank")
        positive += ("num_frames", "height", "width", "fps", "max_sequence_length", "heldout_videos", "evaluate_every")
        positive += ("validation_steps", "checkpoint_every", "keep_checkpoints")
        for name in positive:
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("ema_decay", "caption_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 0, below 1")
        if self.batch_size % self.gradient_accumulation_steps:
            raise ConfigError(
                f"batch_size {self.batch_size} does not split into {self.gradient_accumulation_steps} micro-batches"
            )
        if self.validate_every and not self.validation_prompts:
            raise ConfigError("validate_every is set but validation_prompts is empty; name at least one prompt")
