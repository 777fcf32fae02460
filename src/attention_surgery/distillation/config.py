"""Settings of the attention distillation (Algorithm 1, A.1)."""

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..rates import Normalizer, Pattern, check_normalizer, check_pattern


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """How φ is learned. Defaults are the paper's where it says them.

    Args:
        loss: "value" (Eq. 7) or "attention" (Eq. 6).
        lr: AdamW's learning rate.
        lr_schedule: "linear" falls to 0 over the updates; "constant" is the paper's, as far as it says.
        batch_size: prompts of one teacher trajectory, m of Algorithm 1.
        num_trajectories: teacher trajectories to train on; the prompts are taken in turn.
        updates_per_batch: U of Algorithm 1, passes over the cached activations before they are dropped.
        heldout_prompts: prompts at the end of the list that are never trained on; e_ir is measured on them.
        num_inference_steps: denoising steps of a trajectory.
        guidance_scale: of the trajectory. Conditional and unconditional activations are both learned.
        negative_prompt: of the trajectory.
        num_frames: frames of the trajectory's video; Wan wants 4k + 1.
        height: pixels.
        width: pixels.
        max_sequence_length: text tokens, as the pipeline pads them.
        degree: P, the highest power in φ.
        layers: L, the depth of φ.
        normalizer: of the hybrid attention; "mean", or "max" for Eq. 5 as the paper has it.
        pattern: which tokens keep softmax attention; "stride" is the paper's.
        backend: computes the hybrid attention, as in `hybrid_attention`.
        attention_loss_queries: query rows sampled per update by loss="attention".
        memory_gib: bound on what distillation holds beside the pipeline; decides how many blocks are trained in one
            pass over the trajectories, and how many denoising steps are cached at once (`plan_distillation`).
        checkpoint_every: trajectories between two checkpoints.
        seed: of φ's initialisation, the noises and the order of updates.

    Raises:
        ConfigError: an option outside its range.
    """

    loss: Literal["value", "attention"] = "value"  # A.1
    lr: float = 1e-3  # A.1
    lr_schedule: Literal["linear", "constant"] = "linear"
    batch_size: int = 1  # A.1
    num_trajectories: int = 64
    updates_per_batch: int = 1
    heldout_prompts: int = 2
    num_inference_steps: int = 50  # A.1
    guidance_scale: float = 5.0  # A.1
    negative_prompt: str = ""
    num_frames: int = 81  # §4
    height: int = 480  # §4
    width: int = 832  # §4
    max_sequence_length: int = 512
    degree: int = 2  # §4
    layers: int = 2  # §4
    normalizer: Normalizer = "mean"
    pattern: Pattern = "stride"
    backend: Literal["auto", "eager", "triton"] = "auto"
    attention_loss_queries: int = 256
    memory_gib: float = 16.0
    checkpoint_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.loss not in ("value", "attention"):
            raise ConfigError(f"loss {self.loss!r} does not exist; expected 'value' (Eq. 7) or 'attention' (Eq. 6)")
        if self.lr_schedule not in ("linear", "constant"):
            raise ConfigError(f"lr_schedule {self.lr_schedule!r} does not exist; expected 'linear' or 'constant'")
        if self.backend not in ("auto", "eager", "triton"):
            raise ConfigError(f"backend {self.backend!r} does not exist; expected 'auto', 'eager' or 'triton'")
        for name in ("lr", "memory_gib"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected a number above 0")
        for name in (
            "batch_size",
            "num_trajectories",
            "updates_per_batch",
            "heldout_prompts",
            "num_inference_steps",
            "num_frames",
            "height",
            "width",
            "max_sequence_length",
            "degree",
            "layers",
            "attention_loss_queries",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        check_normalizer(self.normalizer)
        check_pattern(self.pattern)

    @property
    def forwards_per_step(self) -> int:
        """Transformer forwards of one denoising step: two under classifier-free guidance."""
        return 2 if self.guidance_scale > 1 else 1
