"""Doing the trials of one seed: each distillation, each converted model and the teacher once, kept on disk."""

import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import shapes
from ..cost import block_costs
from ..distillation import FeatureMapBank, distill, measure_errors
from ..files import append_jsonl, digest, read_jsonl
from ..finetuning import finetune
from ..finetuning.cache import LatentCache
from ..finetuning.dataset import read_dataset
from ..finetuning.objective import velocity_of
from ..generation import generate, write_video
from ..models import convert_
from ..pipelines import EMBEDDED, load_pipeline, resolve_base
from ..rates import Rate
from ..selection import homogeneous_rates, select_rates
from ..shapes import FPS
from ..teacher.evaluate import captions_for
from .trial import FULL, RATES, SHAPE, Maps, Scale, Trial

PROMPT_SEED, VIDEO_SEED, PROBE_SEED = 40_000, 2_000, 50_000
LEVELS = (0.2, 0.5, 0.8)  # of the timestep before the shift, where the velocity error is measured
KEPT_CLIPS = 2
BATCH = 4


class Laboratory:
    """One seed's results under `folder`; anything that is there already is not done again.

    `trials-SEED.jsonl` has a row per trial and for the teacher, `banks-SEED.jsonl` one per distillation. Processes
    that work on different seeds share a folder without touching each other's files.

    Args:
        folder: of the results.
        scale: how much of everything.
        seed: one of `scale.seeds`.
    """

    def __init__(self, folder: Path, scale: Scale, seed: int) -> None:
        self.folder, self.scale, self.seed = folder, scale, seed
        self.work = folder / "work" / f"seed-{seed}"
        place = FULL.seeds.index(seed) if seed in FULL.seeds else seed
        first = place * scale.captions
        self.captions = captions_for("train", first + scale.captions)[first:]

    def teacher(self) -> dict[str, Any]:
        """Scores of the softmax model itself."""
        return self._once("trials", None, lambda: self._judge(self._pipe(torch.bfloat16), "teacher"))

    def bank(self, maps: Maps) -> dict[str, Any]:
        """The errors of a distillation: {"errors": block → rate → e_ir, as JSON}."""
        return self._once("banks", maps, lambda: {"errors": _as_json(self._distil(maps).errors)})

    def errors_at(self, maps: Maps, frames: int) -> dict[str, Any]:
        """Mean error per rate of a distillation on trajectories of another length."""

        def measure() -> dict[str, Any]:
            config = self.scale.distillation(maps, self.seed)
            prompts = self._prompts()[-self.scale.heldout_prompts :]
            settings = {name: getattr(config, name) for name in config.__dataclass_fields__} | {"num_frames": frames}
            found = measure_errors(
                self._pipe(torch.float32), self._distil(maps), prompts, config=type(config)(**settings)
            )
            return {"errors": _as_json(found)}

        return self._once("lengths", self._length_key(maps, frames), measure)

    def trial(self, trial: Trial) -> dict[str, Any]:
        """Convert, fine-tune and judge: rates, cost, error, velocity error, scores per clip."""
        return self._once("trials", trial, lambda: self._do(trial))

    def find(self, what: Maps | Trial | None) -> dict[str, Any] | None:
        """The result, if it is there."""
        kind = "banks" if isinstance(what, Maps) else "trials"
        return self._rows(kind).get(self.scale.key(what, self.seed))

    def find_errors_at(self, maps: Maps, frames: int) -> dict[str, Any] | None:
        """The result of `errors_at`, if it is there."""
        return self._rows("lengths").get(self._length_key(maps, frames))

    def clip(self, what: Trial | None, number: int) -> Path:
        """Where the clip of caption `number` (below KEPT_CLIPS) of a trial or of the teacher is kept."""
        return self.folder / "clips" / f"{self.scale.key(what, self.seed)}-{number}.mp4"

    def _do(self, trial: Trial) -> dict[str, Any]:
        bank = self._distil(trial.maps)
        rates = self._choose(trial, bank)
        pipe = self._pipe(torch.float32)
        torch.manual_seed(self.seed)  # draws φ where it is not distilled
        convert_(pipe.transformer, bank.hybrid_config(rates))
        if trial.distilled:
            bank.load_into_(pipe.transformer)
        result: dict[str, Any] = {
            "rates": {str(block): rate for block, rate in rates.items()},
            "error": sum(bank.errors[block][rate] for block, rate in rates.items()),
            "remaining": round(self._cost(trial.maps, rates), 6),
        }
        key = self.scale.key(trial, self.seed)
        if trial.steps:
            run = self.work / "finetune" / key
            config = self.scale.finetuning(trial, self.seed)
            finetune(
                pipe,
                self._videos(),
                config=config,
                output_dir=run,
                resume=(run / "config.json").exists(),
                cache_dir=self.work / "latents",
            )
            rows = [row for row in read_jsonl(run / "log.jsonl") if "heldout_loss" in row]
            result["heldout_loss"] = [rows[0]["heldout_loss"], rows[-1]["heldout_loss"]]
        result["velocity_error"] = round(self._velocity_error(pipe), 6)
        sampler = self._pipe(torch.bfloat16)  # keeps in float32 what diffusers keeps so, as the teacher's does
        convert_(sampler.transformer, bank.hybrid_config(rates))
        sampler.transformer.load_state_dict(pipe.transformer.state_dict())
        result |= self._judge(sampler, key)
        shutil.rmtree(self.work / "finetune" / key, ignore_errors=True)
        return result

    def _choose(self, trial: Trial, bank: FeatureMapBank) -> dict[int, Rate]:
        """Converted block → rate."""
        rates = homogeneous_rates(bank.errors, rate=trial.rate, blocks=trial.blocks)
        if trial.heterogeneous:
            rates = select_rates(bank.errors, self._costs(trial.maps), budget=self._cost(trial.maps, rates)).rates
        return {block: rate for block, rate in rates.items() if rate != 1}

    def _costs(self, maps: Maps) -> dict[int, dict[Rate, float]]:
        return block_costs(resolve_base(EMBEDDED), (1, *RATES), degree=maps.degree, layers=maps.layers, **SHAPE)

    def _cost(self, maps: Maps, rates: Mapping[int, Rate]) -> float:
        """FLOPs of the blocks at `rates` as a fraction of all softmax, a billionth above."""
        costs = self._costs(maps)
        total = sum(row[rates.get(block, 1)] for block, row in costs.items())
        return total / sum(row[1] for row in costs.values()) + 1e-9

    def _judge(self, pipe: Any, key: str) -> dict[str, Any]:
        """Sample the seed's captions and let the exact judge read them."""
        pipe.set_progress_bar_config(disable=True)
        rows = []
        for first in range(0, len(self.captions), BATCH):
            part = self.captions[first : first + BATCH]
            seeds = [10_000 * self.seed + first + i for i in range(len(part))]
            clips = generate(pipe, part, seeds, config=self.scale.sampling())
            for number, (caption, clip) in enumerate(zip(part, clips, strict=True), start=first):
                scores = {name: round(value, 4) for name, value in shapes.judge(clip, caption).items()}
                rows.append({"caption": caption, "scores": scores})
                if number < KEPT_CLIPS:
                    what = self.scale.key(None, self.seed) if key == "teacher" else key
                    write_video(self.folder / "clips" / f"{what}-{number}.mp4", clip, fps=FPS)
        return {"clips": rows}

    @torch.no_grad()
    def _velocity_error(self, pipe: Any) -> float:
        """‖v - v_teacher‖₁ / ‖v_teacher‖₁ of the transformer's output on noised held-out clips, mean over levels."""
        config = self.scale.finetuning(Trial(blocks=1, rate=8, steps=1), self.seed)
        shapes.write(self.work / "probes", shapes.render(self.scale.probes, seed=PROBE_SEED + 100 * self.seed))
        cache = LatentCache(self.work / "latents", pipe, read_dataset(self.work / "probes"), config)
        teacher, shift = self._pipe(torch.float32).transformer.eval(), pipe.scheduler.config.flow_shift
        errors = []
        for index in range(len(cache)):
            latents, text = cache[index]
            generator = torch.Generator().manual_seed(int(digest([self.seed, "probe", index])[:12], 16))
            noise = torch.randn(latents.shape, generator=generator)
            sigma = torch.tensor([shift * t / (1 + (shift - 1) * t) for t in LEVELS])
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy = (1 - level) * latents + level * noise
            texts = text.expand(len(LEVELS), *text.shape)
            one, two = (velocity_of(model)(noisy, sigma, texts) for model in (teacher, pipe.transformer))
            errors.append(_relative(two, one))
        return float(np.mean(errors))

    def _distil(self, maps: Maps) -> FeatureMapBank:
        folder = self.work / "banks" / self.scale.key(maps, self.seed)
        if (folder / "bank" / "bank.json").exists():
            return FeatureMapBank.from_pretrained(folder / "bank")
        return distill(
            self._pipe(torch.float32),
            self._prompts(),
            maps.rates,
            config=self.scale.distillation(maps, self.seed),
            output_dir=folder,
            resume=(folder / "config.json").exists(),
        )

    def _length_key(self, maps: Maps, frames: int) -> str:
        return f"{self.scale.key(maps, self.seed)}-{frames}"

    def _prompts(self) -> list[str]:
        count = self.scale.trajectories + self.scale.heldout_prompts
        clips = shapes.render(2 * count, seed=PROMPT_SEED + 1_000 * self.seed)
        return list(dict.fromkeys(clip.caption for clip in clips))[:count]

    def _videos(self) -> Path:
        folder = self.work / "videos"
        shapes.write(folder, shapes.render(self.scale.videos, seed=VIDEO_SEED))
        return folder

    def _pipe(self, dtype: torch.dtype) -> Any:
        return load_pipeline(EMBEDDED, dtype=dtype, device="cpu")

    def _once(self, kind: str, what: Maps | Trial | str | None, work: Any) -> dict[str, Any]:
        key = what if isinstance(what, str) else self.scale.key(what, self.seed)
        row = self._rows(kind).get(key)
        if row is None:
            start = time.monotonic()
            result = work()
            row = {"key": key, "seed": self.seed, "seconds": round(time.monotonic() - start, 1), **result}
            append_jsonl(self.folder / f"{kind}-{self.seed}.jsonl", row)
        return row

    def _rows(self, kind: str) -> dict[str, dict[str, Any]]:
        file = self.folder / f"{kind}-{self.seed}.jsonl"
        return {row["key"]: row for row in read_jsonl(file)} if file.exists() else {}


def _as_json(errors: Mapping[int, Mapping[Rate, float]]) -> dict[str, dict[str, float]]:
    return {str(block): {str(rate): round(e, 6) for rate, e in row.items()} for block, row in errors.items()}


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().sum() / expected.abs().sum()).item()
