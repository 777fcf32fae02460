"""Sizes and training settings of the small teacher."""

from dataclasses import dataclass

from ..errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """The small Wan and how it is trained. The defaults are the GPU recipe; `CPU` is the one for two cores.

    Args:
        width, heads, blocks, ffn: of the transformer.
        text_width, text_layers: of the text encoder.
        vae_width, latent_channels: of the autoencoder, which halves time and quarters both sides.
        clips: rendered training clips.
        vae_minutes, diffusion_minutes: wall-clock time of the two trainings.
        vae_batch, vae_window: clips of a batch, and frames of each, 4k + 1. An autoencoder that is trained on shorter
            windows than it is used on gets worse from frame to frame beyond them (`docs/log.md`).
        batch: latents of a diffusion batch.
        vae_lr, lr: peak learning rates, which fall linearly to 0 with the time used.
        shift: of the timesteps, in training and in the scheduler that is saved.
        caption_dropout: share of clips trained with the empty caption, for guidance.
        ema: decay of the averaged weights, which are the ones that are saved.
        compile: compile the transformer's blocks.
        checkpoint_seconds: time between two checkpoints.
        sample_seconds: time between two contact sheets of samples, whose making does not count as training.
        guidance, steps: sampling settings of the evaluation and of the model card.
        seed: of everything.
    """

    width: int = 256
    heads: int = 8
    blocks: int = 8
    ffn: int = 1024
    text_width: int = 128
    text_layers: int = 2
    vae_width: int = 16
    latent_channels: int = 8
    clips: int = 36_000
    vae_minutes: float = 2.2
    diffusion_minutes: float = 4.5
    vae_batch: int = 48
    vae_window: int = 17
    batch: int = 256
    vae_lr: float = 2e-3
    lr: float = 1.2e-3
    shift: float = 5.0
    caption_dropout: float = 0.1
    ema: float = 0.9985
    compile: bool = True
    checkpoint_seconds: float = 60.0
    sample_seconds: float = 60.0
    guidance: float = 2.0
    steps: int = 25
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width % self.heads or self.width // self.heads % 2:
            raise ConfigError(f"width {self.width} does not split into {self.heads} heads of even size")
        if self.vae_window % 4 != 1:
            raise ConfigError(f"vae_window is {self.vae_window}; expected 4k + 1 frames")


CPU = TeacherConfig(
    width=128,
    heads=4,
    blocks=6,
    ffn=512,
    text_width=64,
    vae_width=12,
    clips=8_000,
    vae_minutes=50,
    diffusion_minutes=120,
    vae_batch=3,
    batch=16,
    compile=False,
    sample_seconds=1200,
)
"""Two cores, under three hours."""
