"""What is tried: which maps are distilled, which blocks get which rate, how it is fine-tuned, how much is measured."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from ..distillation import DistillConfig
from ..errors import ConfigError
from ..files import digest
from ..finetuning import FinetuneConfig
from ..generation import GenerateConfig
from ..rates import Normalizer, Pattern, Rate
from ..shapes import FPS, FRAMES, HEIGHT, WIDTH
from ..teacher.config import TeacherConfig

SHAPE: dict[str, Any] = {"num_frames": FRAMES, "height": HEIGHT, "width": WIDTH}
RATES: tuple[Rate, ...] = (2, 4, 8, "linear")

Hidden = Literal["silu", "gelu", "relu"]
Final = Literal["squareplus", "softplus", "relu", "elu+1"]
Weights = Literal["natural", "pytorch"]


@dataclass(frozen=True, kw_only=True)
class Maps:
    """A distillation: everything about φ that an experiment varies.

    Args:
        rates: at which maps are learned, for every block.
        loss, degree, layers, normalizer, pattern, lr: as in `DistillConfig`.
        hidden, final: non-linearities of φ; the defaults are the library's.
        weights: how φ is drawn: at its natural scale, as the library does, or as `torch.nn.Linear` draws.
    """

    rates: tuple[Rate, ...] = RATES
    loss: Literal["value", "attention"] = "value"
    degree: int = 2
    layers: int = 2
    normalizer: Normalizer = "mean"
    pattern: Pattern = "stride"
    lr: float = 5e-3
    hidden: Hidden = "silu"
    final: Final = "squareplus"
    weights: Weights = "natural"

    @property
    def varied(self) -> bool:
        """Whether φ is another one than the library's, of which only errors can be measured."""
        return (self.hidden, self.final, self.weights) != ("silu", "squareplus", "natural")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One converted model: its maps, its rates, its recovery.

    Args:
        maps: where φ and the errors come from.
        blocks, rate: the `blocks` blocks of least error are converted at `rate` (homogeneous).
        heterogeneous: instead choose rates exactly, within the cost of that homogeneous choice (Eq. 8).
        distilled: load the distilled maps; False leaves them as they are initialised.
        steps: of fine-tuning; 0 leaves it out.
        objective: of fine-tuning.
    """

    maps: Maps = Maps()
    blocks: int
    rate: Rate
    heterogeneous: bool = False
    distilled: bool = True
    steps: int
    objective: Literal["flow", "teacher"] = "flow"

    @property
    def name(self) -> str:
        """Such as "5×R8"."""
        return f"{self.blocks}×{'linear' if self.rate == 'linear' else f'R{self.rate}'}"


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything. `FULL` is what the published tables are made with, `QUICK` only exercises them.

    Args:
        seeds: each repeats everything with other prompts, captions, noises and initial weights.
        captions: judged clips per seed; each seed has captions of its own.
        sampling_steps: denoising steps of a judged clip.
        trajectories, trajectory_steps, updates_per_batch, heldout_prompts: of distillation, which takes
            trajectories · 2 trajectory_steps · updates_per_batch steps.
        steps: of fine-tuning.
        batch_size, videos, heldout_videos: of fine-tuning.
        probes: held-out clips that the velocity error is measured on.
        lengths: frames at which the errors of normalizers are compared.
        most_layers: deepest φ of the degree-and-depth experiment, to leave out the slow ones.
    """

    seeds: tuple[int, ...] = (0, 1, 2)
    captions: int = 32
    sampling_steps: int = 12
    trajectories: int = 12
    trajectory_steps: int = 10
    updates_per_batch: int = 2
    heldout_prompts: int = 2
    steps: int = 100
    batch_size: int = 8
    videos: int = 256
    heldout_videos: int = 2
    probes: int = 8
    lengths: tuple[int, ...] = (9, 17, 33)
    most_layers: int = 3

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ConfigError(f"seeds {self.seeds} are none, or repeat; expected different ones")

    def distillation(self, maps: Maps, seed: int) -> DistillConfig:
        """Settings of distilling `maps`."""
        names = ("loss", "lr", "degree", "layers", "normalizer", "pattern")
        return DistillConfig(
            num_trajectories=self.trajectories,
            num_inference_steps=self.trajectory_steps,
            updates_per_batch=self.updates_per_batch,
            heldout_prompts=self.heldout_prompts,
            guidance_scale=TeacherConfig.guidance,
            checkpoint_every=max(1, self.trajectories // 3),
            backend="eager",  # which takes every φ
            seed=seed,
            **{name: getattr(maps, name) for name in names},
            **SHAPE,
        )

    def finetuning(self, trial: Trial, seed: int) -> FinetuneConfig:
        """Settings of fine-tuning `trial`."""
        return FinetuneConfig(
            lr=1e-4,
            batch_size=self.batch_size,
            max_steps=trial.steps,
            objective=trial.objective,
            mixed_precision="no",
            gradient_checkpointing=False,
            heldout_videos=self.heldout_videos,
            evaluate_every=trial.steps,
            checkpoint_every=50,
            keep_checkpoints=1,
            fps=FPS,
            seed=seed,
            **SHAPE,
        )

    def sampling(self) -> GenerateConfig:
        """Settings of the judged clips."""
        return GenerateConfig(
            num_inference_steps=self.sampling_steps,
            guidance_scale=TeacherConfig.guidance,
            negative_prompt="",
            fps=FPS,
            **SHAPE,
        )

    def key(self, what: Maps | Trial | None, seed: int) -> str:
        """Tells results apart: a digest of what was done, at which scale, with which seed."""
        scale = {name: value for name, value in dataclasses.asdict(self).items() if name not in ("seeds", "lengths")}
        del scale["most_layers"], scale["steps"]
        described: dict[str, Any] | None = None if what is None else dataclasses.asdict(what)
        return digest([type(what).__name__, described, scale, seed])[:16]


FULL = Scale()
QUICK = Scale(
    seeds=(0,),
    captions=2,
    sampling_steps=1,
    trajectories=1,
    trajectory_steps=1,
    updates_per_batch=1,
    heldout_prompts=1,
    steps=1,
    batch_size=1,
    videos=6,
    heldout_videos=1,
    probes=1,
    lengths=(9, 17),
    most_layers=2,
)
