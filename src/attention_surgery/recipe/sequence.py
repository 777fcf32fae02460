"""`run`: the whole recipe in one folder, stopped and started at will."""

import importlib.metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import shapes
from ..evaluation import compare
from ..files import digest, write_json, write_text
from ..generation import read_video
from ..pipelines import EMBEDDED
from ..processes import refuse_several
from ..rates import Rate
from ..report import build_report
from .config import RecipeConfig
from .folder import RunFolder
from .stages import (
    base_digest,
    convert_stage,
    distill_stage,
    finetune_stage,
    generate_stage,
    profile_stage,
    read_prompts,
    read_rates,
    select_stage,
)

PROMPT_SEED, VIDEO_SEED, SAMPLE_SEED = 1_000, 2_000, 3_000
EMBEDDED_PROMPTS, EMBEDDED_VIDEOS = 64, 96


def run(config: RecipeConfig, folder: str | Path) -> Path:
    """Profile, distil, select, convert, generate, fine-tune, generate again, judge and report; return the report.

    Every stage writes into `folder` and is done once; a run that was stopped, at any point and in any way, goes on with
    the same call.

    Raises:
        RunError: `folder` is in use for something else, or was made with other settings; or several processes.
    """
    refuse_several("run")
    at = RunFolder(Path(folder))
    given = {name: getattr(config, name) for name in ("prompts", "sample_prompts")}
    lines = {name: digest(read_prompts(file)) for name, file in given.items() if file}
    at.claim(config.to_dict() | {"lines": lines, "weights": base_digest(config.base)})
    path = at.path
    dtype = getattr(torch, config.dtype)
    place = {"dtype": dtype, "device": config.device}
    shape = {name: getattr(config.generate, name) for name in ("num_frames", "height", "width")}
    phi = {"degree": config.distill.degree, "layers": config.distill.layers}
    prompts, samples, videos = _inputs(config, path)
    write_json(
        path / "videos" / "samples.json",
        [{"prompt": prompt, "seed": i, "file": f"{i:04d}.mp4"} for i, prompt in enumerate(samples)],
    )

    def versions() -> dict[str, str]:
        return {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "attention-surgery")}

    at.stage(
        "profile",
        lambda: {
            **profile_stage(config.base, path / "profile.json", rates=None, phi=phi, **shape),
            "versions": versions(),
        },
    )
    distilled = at.stage(
        "distill",
        lambda: distill_stage(config.base, prompts, config.rates, path / "distill", config=config.distill, **place),
    )
    chosen = at.stage(
        "select",
        lambda: select_stage(
            config.base,
            path / "distill" / "bank",
            path / "selection.json",
            budget=config.budget,
            unit=config.unit,
            **shape,
        ),
    )
    rates: dict[int, Rate] = read_rates(path / "selection.json")
    at.stage(
        "convert",
        lambda: {
            **convert_stage(config.base, path / "distill" / "bank", rates, path / "converted", dtype=dtype),
            **profile_stage(config.base, path / "profile.json", rates=rates, phi=phi, **shape),
        },
    )

    def sample(variant: str, checkpoint: Path | None) -> None:
        target = path / "videos" / variant
        at.stage(
            f"generate {variant}",
            lambda: generate_stage(config.base, checkpoint, samples, target, config=config.generate, **place),
        )

    sample("teacher", None)
    sample("distilled", path / "converted")
    provenance = {"errors": distilled["errors"], "cost": chosen["cost"], "recipe": config.to_dict()}
    at.stage(
        "finetune",
        lambda: finetune_stage(
            config.base,
            path / "converted",
            videos,
            path / "finetune",
            path / "model",
            config=config.finetune,
            provenance=provenance,
            **place,
        ),
    )
    sample("hybrid", path / "model")
    if config.base == EMBEDDED:
        at.stage("judge", lambda: judge_run(path, samples))
    return build_report(path)


def _inputs(config: RecipeConfig, path: Path) -> tuple[list[str], list[str], Path]:
    """Training prompts, prompts to compare on, and the folder of videos; the embedded world makes its own."""
    if config.base != EMBEDDED:
        assert config.prompts and config.sample_prompts and config.videos
        return (
            read_prompts(config.prompts),
            read_prompts(config.sample_prompts)[: config.num_samples],
            Path(config.videos),
        )
    prompts = read_prompts(config.prompts) if config.prompts else _captions(EMBEDDED_PROMPTS, PROMPT_SEED)
    samples = read_prompts(config.sample_prompts) if config.sample_prompts else _captions(64, SAMPLE_SEED)
    samples = [caption for caption in samples if caption not in set(prompts)][: config.num_samples]
    if not (path / "prompts.txt").exists():
        write_text(path / "prompts.txt", "\n".join(prompts) + "\n")
    if config.videos:
        return prompts, samples, Path(config.videos)
    shapes.write(path / "data", shapes.render(EMBEDDED_VIDEOS, seed=VIDEO_SEED))
    return prompts, samples, path / "data"


def _captions(n: int, seed: int) -> list[str]:
    return list(dict.fromkeys(clip.caption for clip in shapes.render(n, seed=seed)))


def judge_run(path: Path, samples: list[str]) -> dict[str, Any]:
    """Mean scores of the exact judge over each model's videos, and how the hybrid differs from the teacher, in %."""
    values: dict[str, dict[str, dict[str, list[float]]]] = {}
    for variant in ("teacher", "distilled", "hybrid"):
        found = values.setdefault(variant, {})
        for i, caption in enumerate(samples):
            video = read_video(path / "videos" / variant / f"{i:04d}.mp4")
            for name, score in shapes.judge(video, caption).items():
                found.setdefault(name, {}).setdefault(caption, []).append(score)
    variants = {
        variant: {
            name: float(np.mean([score for scores in rows.values() for score in scores]))
            for name, rows in found.items()
        }
        for variant, found in values.items()
    }
    difference = {
        row.name: {"value": row.difference, "interval": row.interval}
        for row in compare(values["teacher"], values["hybrid"])
    }
    write_json(path / "scores.json", {"videos": len(samples), "variants": variants, "difference": difference})
    return {variant: row["semantic"] for variant, row in variants.items()}
