"""How the videos of an evaluation are sampled: Wan 2.1's reference settings, and those of the small world."""

from dataclasses import dataclass, field
from typing import Any, Literal

from ..errors import ConfigError
from ..generation import GenerateConfig
from ..shapes import FPS, FRAMES, HEIGHT, WIDTH
from ..teacher.config import TeacherConfig

WAN_SAMPLE_NEG_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，"
    "静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` of Wan 2.1's own configuration, which its VBench entries were sampled with."""


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(GenerateConfig):
    """Settings of generation, and the scheduler. The defaults are those of Wan 2.1 1.3B's VBench reproduction.

    Args:
        scheduler: "unipc" for UniPC on flow-matching sigmas, "own" for the one that the pipeline came with.
        flow_shift: of UniPC's timesteps; 3 at 480p. Wan's README suggests 8 to 12 for single videos.
    """

    negative_prompt: str = field(default=WAN_SAMPLE_NEG_PROMPT, repr=False)
    scheduler: Literal["unipc", "own"] = "unipc"
    flow_shift: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scheduler not in ("unipc", "own"):
            raise ConfigError(f"scheduler {self.scheduler!r} does not exist; expected 'unipc' or 'own'")
        if not self.flow_shift > 0:
            raise ConfigError(f"flow_shift is {self.flow_shift}; expected more than 0")


WAN_SAMPLING = SamplingConfig()
"""Guidance 6, shift 3, 50 UniPC steps, 81×480×832: what VBench's team answers for Wan 2.1 1.3B."""

SHAPES_SAMPLING = SamplingConfig(
    num_frames=FRAMES,
    height=HEIGHT,
    width=WIDTH,
    fps=FPS,
    num_inference_steps=TeacherConfig.steps,
    guidance_scale=TeacherConfig.guidance,
    negative_prompt="",
    scheduler="own",
)
"""The embedded tiny-wan as its model card samples it."""


def set_scheduler_(pipe: Any, config: SamplingConfig) -> None:
    """Give a diffusers pipeline the scheduler of `config`, in place."""
    if config.scheduler == "unipc":
        from diffusers import UniPCMultistepScheduler  # seconds to import, which the settings do not need

        pipe.scheduler = UniPCMultistepScheduler.from_config(
            pipe.scheduler.config,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=config.flow_shift,
        )
