"""What an evaluation is made of."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError
from .sampling import SHAPES_SAMPLING, WAN_SAMPLING, SamplingConfig
from .suite import Suite
from .vbench import VBENCH
from .vbench2 import VBENCH2

SUITES = {suite.name: suite for suite in (VBENCH, VBENCH2)}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which benchmark, on which prompts and seeds, sampled how, judged where.

    Args:
        suite: "vbench", "vbench2", or "shapes", the small world with its exact judge.
        sampling: how videos are sampled. None: Wan 2.1's reference settings, or tiny-wan's for "shapes".
        batch_size: videos made at once.
        seeds: of the videos of one prompt, first to last. None: 0, 1, 2, …, as many as needed; one for "shapes".
        seed_stride: distance between the seeds of two prompts. 0: the same at every prompt.
        every: keep one prompt in so many; seeds do not change by it.
        dimensions: those to judge; none named: all. Groups and totals need all.
        info: `VBench_full_info.json` or `VBench2_full_info.json`. None: the one in `python`'s official package.
        originals: the official prompts in the order of `augmented`: a text file, or a folder of one per dimension.
        augmented: longer prompts that the models are given instead, line by line: a file or a folder.
        python: interpreter of the environment with the official tool. None: use the result files that are there.
        gpus: GPUs that judge, one dimension on each at a time. None named: one at a time, where the tool puts itself.
        flickering_videos: videos per prompt of VBench's temporal flickering; above 5, VBench's static filter keeps the
            first five static ones, as its authors ask for.
        num_prompts: captions of "shapes".
        split: whether those captions are combinations held out of training or seen in it.
        resamples: of the bootstrap that gives the intervals.
        confidence: of the intervals.
        bootstrap_seed: of the resamples.
    """

    suite: Literal["vbench", "vbench2", "shapes"] = "shapes"
    sampling: SamplingConfig | None = None
    batch_size: int = 1
    seeds: tuple[int, ...] | None = None
    seed_stride: int = 100_000
    every: int = 1
    dimensions: tuple[str, ...] = ()
    info: Path | None = None
    originals: Path | None = None
    augmented: Path | None = None
    python: Path | None = None
    gpus: tuple[str, ...] = ()
    flickering_videos: int = 5
    num_prompts: int = 100
    split: Literal["train", "heldout"] = "heldout"
    resamples: int = 10_000
    confidence: float = 0.95
    bootstrap_seed: int = 0

    def __post_init__(self) -> None:
        if self.suite not in (*SUITES, "shapes"):
            raise ConfigError(f"suite {self.suite!r} does not exist; expected 'vbench', 'vbench2' or 'shapes'")
        if self.split not in ("train", "heldout"):
            raise ConfigError(f"split {self.split!r} does not exist; expected 'train' or 'heldout'")
        for name in ("batch_size", "every", "num_prompts", "resamples"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; expected at least 1")
        if self.seeds is not None and not self.seeds:
            raise ConfigError("seeds is empty; name one per video of a prompt, or leave it out")
        if not 0 < self.confidence < 1:
            raise ConfigError(f"confidence is {self.confidence}; expected a number between 0 and 1")
        if self.flickering_videos < 5:
            raise ConfigError(f"flickering_videos is {self.flickering_videos}; VBench judges 5, so expected at least 5")
        if self.flickering_videos > 5 and self.suite != "vbench":
            raise ConfigError("flickering_videos is of suite 'vbench' only")
        if self.suite == "shapes":
            for name in ("dimensions", "info", "originals", "augmented", "python", "gpus"):
                if getattr(self, name):
                    raise ConfigError(f"{name} is of the suites 'vbench' and 'vbench2' only")
        else:
            for name in self.dimensions:
                self.benchmark.dimension(name)
            if self.info is None and self.python is None:
                raise ConfigError(
                    f"give info, the path of {self.benchmark.info_file}, or python, an interpreter that has "
                    f"{self.benchmark.package} installed"
                )

    @property
    def benchmark(self) -> Suite:
        """The official benchmark. Not for "shapes"."""
        return SUITES[self.suite]

    @property
    def resolved_sampling(self) -> SamplingConfig:
        """`sampling`, or the suite's own."""
        return self.sampling or (SHAPES_SAMPLING if self.suite == "shapes" else WAN_SAMPLING)

    def video_settings(self) -> dict[str, Any]:
        """What decides the videos, as a JSON object: a folder that was made with other ones is refused."""
        return {
            "suite": self.suite,
            "sampling": dataclasses.asdict(self.resolved_sampling),
            "seeds": None if self.seeds is None else list(self.seeds),
            "seed_stride": self.seed_stride,
        }
