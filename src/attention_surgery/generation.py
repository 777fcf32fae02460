"""Videos out of a pipeline, one per prompt and seed, and to and from mp4 files."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import ConfigError, DataError
from .files import write_atomic

WAN_NEGATIVE_PROMPT = (
    "Bright tones, overexposed, static, blurred details, subtitles, style, works, paintings, images, static, overall "
    "gray, worst quality, low quality, JPEG compression residue, ugly, incomplete, extra fingers, poorly drawn hands, "
    "poorly drawn faces, deformed, disfigured, misshapen limbs, fused fingers, still picture, messy background, three "
    "legs, many people in the background, walking backwards"
)
"""The negative prompt of Wan 2.1's own sampling settings, in the English form that diffusers documents."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """How a pipeline is sampled. The defaults are Wan 2.1's at its native resolution (§4).

    Args:
        num_frames: frames of a video; Wan wants 4k + 1.
        height: pixels.
        width: pixels.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance.
        negative_prompt: what guidance steers away from.
        fps: frames per second of the written files.
        max_sequence_length: text tokens, as the pipeline pads them.
    """

    num_frames: int = 81  # §4
    height: int = 480  # §4
    width: int = 832  # §4
    num_inference_steps: int = 50
    guidance_scale: float = 6.0
    negative_prompt: str = field(default=WAN_NEGATIVE_PROMPT, repr=False)
    fps: int = 16
    max_sequence_length: int = 512

    def __post_init__(self) -> None:
        for name in ("num_frames", "height", "width", "num_inference_steps", "fps", "max_sequence_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")

    def call_kwargs(self) -> dict[str, Any]:
        """The arguments of `WanPipeline.__call__` that these settings are."""
        return {
            name: getattr(self, name)
            for name in (
                "num_frames",
                "height",
                "width",
                "num_inference_steps",
                "guidance_scale",
                "negative_prompt",
                "max_sequence_length",
            )
        }


def generate(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], *, config: GenerateConfig | None = None
) -> list[NDArray[np.uint8]]:
    """Sample one video per (prompt, seed) pair, all in one batch.

    The noise of each video depends on its own seed only, drawn on the CPU: the same on every device and in every batch.

    Args:
        pipe: a `WanPipeline`, its transformer converted or not.
        prompts, seeds: of the same length.
        config: sampling settings.

    Returns:
        One uint8 array (f, h, w, 3) per prompt.

    Raises:
        DataError: no prompts, or another number of seeds than prompts.
    """
    import torch  # settings do not wait for it

    config = config or GenerateConfig()
    if not prompts or len(prompts) != len(seeds):
        raise DataError(f"generate needs one seed per prompt, and at least one; got {len(prompts)} and {len(seeds)}")
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    frames = pipe(prompt=list(prompts), generator=generators, output_type="np", **config.call_kwargs()).frames
    return [(np.clip(video, 0, 1) * 255).round().astype(np.uint8) for video in frames]


def write_video(path: str | Path, frames: NDArray[np.uint8], *, fps: int) -> None:
    """Write uint8 frames (f, h, w, 3) as an H.264 mp4 that browsers play, atomically. Odd sizes are padded by one."""
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not len(frames):
        raise DataError(f"a video is uint8 (f, h, w, 3); got {frames.dtype} {frames.shape}")
    import av

    padding = ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0))
    frames = np.pad(frames, padding, mode="edge")
    with write_atomic(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=Fraction(fps), options={"crf": "12", "preset": "medium"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def read_video(path: str | Path) -> NDArray[np.uint8]:
    """Decode a video file to uint8 frames (f, h, w, 3). DataError, naming the file, if it does not decode."""
    import av

    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (av.FFmpegError, IndexError) as error:
        raise DataError(f"{path} does not decode as a video: {error}") from error
    if not frames:
        raise DataError(f"{path} holds no video frame")
    return np.stack(frames).astype(np.uint8, copy=False)
