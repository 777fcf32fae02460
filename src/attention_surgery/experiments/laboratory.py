"""Doing one item: a distillation, the teacher's scores, a converted model's."""

import copy
import dataclasses
import platform
import shutil
import time
from collections.abc import Mapping
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from accelerate import PartialState
from torch import Tensor

from .. import shapes
from ..cost import block_costs
from ..distillation import FeatureMapBank, distill, measure_errors
from ..files import digest, read_jsonl
from ..finetuning import finetune
from ..finetuning.cache import LatentCache
from ..finetuning.dataset import read_dataset
from ..finetuning.objective import timestep_shift, velocity_of
from ..generation import generate, write_video
from ..models import HybridConfig, convert_, hybrid_processors
from ..pipelines import EMBEDDED, load_pipeline, resolve_base, resolve_device
from ..rates import Rate
from ..selection import homogeneous_rates, select_rates
from ..shapes import FPS
from ..teacher.evaluate import captions_for
from .records import Item, Records, Row
from .trial import FULL, RATES, SHAPE, Maps, Scale, Trial
from .variants import dead_features, distil_variant

PROMPT_SEED, VIDEO_SEED, PROBE_SEED = 40_000, 2_000, 50_000
LEVELS = (0.2, 0.5, 0.8)  # of the timestep before the shift, where the velocity error is measured
KEPT_CLIPS = 2
BATCH = {"cpu": 4, "cuda": 32}  # clips that are sampled at once; their noise does not depend on it


class Laboratory:
    """Does items of one folder on one device. Several may work in one folder, on different items.

    Args:
        folder: of the results.
        scale: how much of everything.
        device: a torch device, or "auto".
    """

    def __init__(self, folder: Path, scale: Scale, device: str = "auto") -> None:
        self.records, self.scale = Records(folder, scale), scale
        self.work = self.records.work
        self.device = resolve_device(device)
        self._probes: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}
        PartialState(cpu=self.device.type == "cpu")  # accelerate would take the GPU for itself
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32

    def do(self, item: Item) -> Row:
        """The result of `item`, with the seconds it took, the device and the versions."""
        start = time.monotonic()
        match item.kind, item.what:
            case "videos", None:
                result = self.videos()
            case "teacher", None:
                result = self._judge(self._pipe(torch.bfloat16), item)
            case "bank", Maps() as maps:
                result = self.bank(maps, item.seed)
            case "lengths", Maps() as maps:
                result = self.lengths(maps, item.seed, item.frames)
            case "trial", Trial() as trial:
                result = self.trial(trial, item)
            case _:
                raise AssertionError(item)
        seconds = round(time.monotonic() - start, 1)
        return {"seconds": seconds, "device": self._device_name(), "versions": versions(), **result}

    def captions(self, seed: int) -> list[str]:
        """What a seed's clips are asked for; no other seed's."""
        last = (1 + FULL.seeds.index(seed)) * self.scale.captions
        return captions_for("train", last)[-self.scale.captions :]

    def videos(self) -> Row:
        """Render and encode what fine-tuning reads, and the held-out clips of every seed; nothing is done twice."""
        pipe, config = self._pipe(torch.float32), self.scale.finetuning(Trial(blocks=1, rate=8, steps=1), 0)
        shapes.write(self.work / "videos", shapes.render(self.scale.videos, seed=VIDEO_SEED))
        LatentCache(self.work / "latents", pipe, read_dataset(self.work / "videos"), config)
        for seed in self.scale.seeds:
            folder = self.work / f"probes-{seed}"
            shapes.write(folder, shapes.render(self.scale.probes, seed=PROBE_SEED + 100 * seed))
            LatentCache(self.work / "latents", pipe, read_dataset(folder), config)
        return {}

    def bank(self, maps: Maps, seed: int) -> Row:
        """Distil: the errors, block → rate → e_ir as JSON, and the share of features that no longer learn."""
        folder, pipe = self.records.bank_folder(maps, seed), self._pipe(torch.float32)
        prompts, config = self._prompts(seed), self.scale.distillation(maps, seed)
        if maps.varied:
            bank = distil_variant(pipe, prompts, maps, config=config, folder=folder)
        elif (folder / "bank" / "bank.json").exists():
            bank = self._bank(maps, seed)
        else:
            resume = (folder / "config.json").exists()
            bank = distill(pipe, prompts, maps.rates, config=config, output_dir=folder, resume=resume)
        dead = dead_features(pipe, bank, prompts[-1], config=config)
        for checkpoint in folder.glob("pass-*.pt"):
            checkpoint.unlink()  # the optimizer's moments are most of it
        return {"errors": _as_json(bank.errors), "dead": {str(rate): round(share, 6) for rate, share in dead.items()}}

    def lengths(self, maps: Maps, seed: int, frames: int) -> Row:
        """The errors of a distillation on trajectories of another length."""
        config = dataclasses.replace(self.scale.distillation(maps, seed), num_frames=frames)
        prompts = self._prompts(seed)[-self.scale.heldout_prompts :]
        found = measure_errors(self._pipe(torch.float32), self._bank(maps, seed), prompts, config=config)
        return {"errors": _as_json(found)}

    def trial(self, trial: Trial, item: Item) -> Row:
        """Convert, fine-tune and judge: rates, cost, error, velocity error, scores per clip."""
        bank = self._bank(trial.maps, item.seed)
        rates = _choose(trial, bank)
        pipe = self._pipe(torch.float32)
        torch.manual_seed(item.seed)  # draws φ where it is not distilled
        _convert(pipe.transformer, bank.hybrid_config(rates))
        if trial.distilled:
            bank.load_into_(pipe.transformer)
        result: Row = {
            "rates": {str(block): rate for block, rate in rates.items()},
            "error": sum(bank.errors[block][rate] for block, rate in rates.items()),
            "remaining": round(_cost(trial.maps, rates), 6),
        }
        run = self.work / "finetune" / self.records.key(item)
        if trial.steps:
            finetune(
                pipe,
                self.work / "videos",
                config=self.scale.finetuning(trial, item.seed),
                output_dir=run,
                resume=(run / "config.json").exists(),
                cache_dir=self.work / "latents",
            )
            rows = [row for row in read_jsonl(run / "log.jsonl") if "heldout_loss" in row]
            result["heldout_loss"] = [rows[0]["heldout_loss"], rows[-1]["heldout_loss"]]
        result["velocity_error"] = round(self._velocity_error(pipe.transformer, item.seed), 6)
        sampler = self._pipe(torch.bfloat16)  # keeps in float32 what diffusers keeps so, as the teacher's does
        _convert(sampler.transformer, bank.hybrid_config(rates))
        sampler.transformer.load_state_dict(pipe.transformer.state_dict())
        result |= self._judge(sampler, item)
        shutil.rmtree(run, ignore_errors=True)
        return result

    def _judge(self, pipe: Any, item: Item) -> Row:
        """Sample the seed's captions and let the exact judge read them."""
        pipe.set_progress_bar_config(disable=True)
        captions = self.captions(item.seed)
        batch, rows = BATCH[self.device.type], []
        for first in range(0, len(captions), batch):
            part = captions[first : first + batch]
            seeds = [10_000 * item.seed + first + i for i in range(len(part))]
            clips = generate(pipe, part, seeds, config=self.scale.sampling())
            for number, (caption, clip) in enumerate(zip(part, clips, strict=True), start=first):
                scores = {name: round(value, 4) for name, value in shapes.judge(clip, caption).items()}
                rows.append({"caption": caption, "scores": scores})
                if number < KEPT_CLIPS:
                    what = item.what if isinstance(item.what, Trial) else None
                    write_video(self.records.clip(what, item.seed, number), clip, fps=FPS)
        return {"clips": rows}

    @torch.no_grad()
    def _velocity_error(self, transformer: Any, seed: int) -> float:
        """‖v - v_teacher‖₁ / ‖v_teacher‖₁ of the transformer's output on noised held-out clips, mean over clips."""
        if seed not in self._probes:
            self._probes[seed] = self._probe(seed)
        noisy, sigma, text, expected = self._probes[seed]
        found = _velocity(transformer, noisy, sigma, text)
        errors = [_relative(one, two) for one, two in zip(found, expected, strict=True)]
        return float(np.mean(errors))

    @torch.no_grad()
    def _probe(self, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Noised held-out clips (probe level …), their noise levels and texts, and the teacher's velocity."""
        pipe, config = self._pipe(torch.float32), self.scale.finetuning(Trial(blocks=1, rate=8, steps=1), seed)
        cached = LatentCache(self.work / "latents", pipe, read_dataset(self.work / f"probes-{seed}"), config)
        shift = timestep_shift(pipe, config)
        sigma = torch.tensor([shift * t / (1 + (shift - 1) * t) for t in LEVELS])
        noisy, texts = [], []
        for index in range(len(cached)):
            latents, text = cached[index]
            generator = torch.Generator().manual_seed(int(digest([seed, "probe", index])[:12], 16))
            noise = torch.randn(latents.shape, generator=generator)
            level = sigma.view(-1, 1, 1, 1, 1)
            noisy.append((1 - level) * latents + level * noise)
            texts.append(text.expand(len(LEVELS), *text.shape))
        levels = sigma.expand(len(cached), -1).to(self.device)
        noised, text = torch.stack(noisy).to(self.device), torch.stack(texts).to(self.device)
        return noised, levels, text, _velocity(pipe.transformer, noised, levels, text)

    def _bank(self, maps: Maps, seed: int) -> FeatureMapBank:
        return FeatureMapBank.from_pretrained(self.records.bank_folder(maps, seed) / "bank")

    def _prompts(self, seed: int) -> list[str]:
        count = self.scale.trajectories + self.scale.heldout_prompts
        clips = shapes.render(2 * count, seed=PROMPT_SEED + 1_000 * seed)
        return list(dict.fromkeys(clip.caption for clip in clips))[:count]

    def _pipe(self, dtype: torch.dtype) -> Any:
        """A pipeline with a transformer of its own, to be changed at will; the other parts are shared."""
        stock = _stock(dtype, self.device)
        return type(stock)(**{**stock.components, "transformer": copy.deepcopy(stock.transformer)})

    def _device_name(self) -> str:
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()})"


@cache
def _stock(dtype: torch.dtype, device: torch.device) -> Any:
    return load_pipeline(EMBEDDED, dtype=dtype, device=str(device))


@cache
def versions() -> dict[str, str]:
    """Of what the numbers depend on."""
    return {name: version(name) for name in ("torch", "diffusers", "transformers")}


def _convert(transformer: Any, config: HybridConfig) -> None:
    """Convert to the PyTorch path, which takes every φ, so that all trials are computed alike."""
    convert_(transformer, config)
    for processor in hybrid_processors(transformer).values():
        processor.backend = "eager"


def _choose(trial: Trial, bank: FeatureMapBank) -> dict[int, Rate]:
    """Converted block → rate."""
    rates = homogeneous_rates(bank.errors, rate=trial.rate, blocks=trial.blocks)
    if trial.heterogeneous:
        rates = select_rates(bank.errors, _costs(trial.maps), budget=_cost(trial.maps, rates)).rates
    return {block: rate for block, rate in rates.items() if rate != 1}


@cache
def _costs(maps: Maps) -> dict[int, dict[Rate, float]]:
    return block_costs(resolve_base(EMBEDDED), (1, *RATES), degree=maps.degree, layers=maps.layers, **SHAPE)


def _cost(maps: Maps, rates: Mapping[int, Rate]) -> float:
    """FLOPs of the blocks at `rates` as a fraction of all softmax, a billionth above."""
    costs = _costs(maps)
    total = sum(row[rates.get(block, 1)] for block, row in costs.items())
    return total / sum(row[1] for row in costs.values()) + 1e-9


def _velocity(transformer: Any, noisy: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
    """Of all probes and levels in one forward; (probe level …) like `noisy`."""
    found = velocity_of(transformer.eval())(noisy.flatten(0, 1), sigma.flatten(), text.flatten(0, 1))
    return found.unflatten(0, noisy.shape[:2])


def _as_json(errors: Mapping[int, Mapping[Rate, float]]) -> dict[str, dict[str, float]]:
    return {str(block): {str(rate): round(e, 6) for rate, e in row.items()} for block, row in errors.items()}


def _relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs().sum() / expected.abs().sum()).item()
