"""Putting a trained teacher into the package, with a card that says what the run really did."""

import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import WanPipeline

from ..errors import CheckpointError
from ..files import read_json, read_jsonl, write_text
from .embedded import EMBEDDED

CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-video
---

# tiny-wan

A complete, small `WanPipeline` for tests and experiments: clips of 17 × 64 × 64 pixels of moving shapes, from captions
of a small grammar. Every class is a stock one of diffusers and transformers.

```python
from diffusers import WanPipeline
import attention_surgery as asg

pipe = WanPipeline.from_pretrained(asg.tiny_wan())
caption = "a large red square moves left on a striped backdrop"
pipe(caption, num_frames=17, height=64, width=64, num_inference_steps={steps}, guidance_scale={guidance})
```

| | |
|---|---|
| transformer | {blocks} blocks, width {width}, {heads} heads of {head_dim}, {tokens} tokens at the native shape |
| parameters of transformer and text encoder | {parameters:.2f} M |
| autoencoder | 2× in time, 4× in both sides, {latent_channels} channels; {psnr:.1f} dB PSNR on held-out clips |
| trained on | {clips} rendered clips, {device}, torch {torch} |
| minutes | autoencoder {vae_minutes:.1f}, diffusion {minutes:.1f} ({diffusion_steps} steps of {batch}){history} |
| timestep shift | {shift}, in training and in the saved scheduler |
| sampling for the scores below | {steps} steps, guidance {guidance}, fixed seeds |

Scores of the exact judge (`attention_surgery.shapes.judge`) on the teacher's own samples, in %:

| | {seen} seen combinations | {heldout} held-out combinations |
|---|---|---|
{rows}

Every clip's scores: `benchmarks/results/teacher_scores.csv`.

![samples](samples.png)

Made by `python -m attention_surgery.teacher train`, `evaluate` and `install`. The captions and clips are procedural
(`attention_surgery.shapes`); nothing was downloaded.
"""


def install(
    run: Path,
    evaluation: Path,
    *,
    earlier: Sequence[Path] = (),
    target: Path = EMBEDDED,
    results: Path = Path("benchmarks/results"),
) -> None:
    """Copy `run/tiny-wan` to `target` with a model card, the contact sheet beside it and the scores to `results`.

    Raises:
        CheckpointError: the parts together exceed 25 MB.
    """
    pipe = WanPipeline.from_pretrained(run / "tiny-wan", dtype=torch.bfloat16)
    staging = target.with_name(target.name + ".new")
    shutil.rmtree(staging, ignore_errors=True)
    pipe.save_pretrained(staging, max_shard_size="100MB")
    for part in ("", "tokenizer", "text_encoder", "vae", "transformer", "scheduler"):
        _drop_paths(staging / part)
    size = sum(file.stat().st_size for file in staging.rglob("*.safetensors"))
    if size > 25e6:
        shutil.rmtree(staging)
        raise CheckpointError(f"the weights take {size / 1e6:.1f} MB; at most 25 MB are shipped")
    write_text(staging / "README.md", model_card(run, evaluation, earlier))
    shutil.copy(evaluation / "samples.png", staging / "samples.png")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)
    results.mkdir(parents=True, exist_ok=True)
    shutil.copy(evaluation / "scores.csv", results / "teacher_scores.csv")
    shutil.copy(run / "log.jsonl", results / "teacher_training.jsonl")


def model_card(run: Path, evaluation: Path, earlier: Sequence[Path] = ()) -> str:
    """The card of a run, from its log and its evaluation, and the runs whose weights it started from."""
    config, log, judged = (
        read_json(run / "config.json"),
        read_jsonl(run / "log.jsonl"),
        read_json(evaluation / "evaluation.json"),
    )
    start = next(row for row in log if row["stage"] == "start")
    diffusion = [row for row in log if row["stage"] == "diffusion" and "step" in row]
    seen, heldout = judged["scores"]["train"], judged["scores"]["heldout"]
    rows = [f"| {name.replace('_', ' ')} | {100 * seen[name]:.1f} | {100 * heldout[name]:.1f} |" for name in seen]
    return CARD.format(
        **{name: config[name] for name in ("blocks", "width", "heads", "latent_channels", "clips", "batch", "shift")},
        vae_minutes=config["vae_minutes"],
        head_dim=config["width"] // config["heads"],
        tokens=9 * 8 * 8,
        parameters=next(row["parameters"] for row in log if "parameters" in row) / 1e6,
        psnr=next(row["heldout_psnr"] for row in log if "heldout_psnr" in row),
        device=start["device"],
        torch=start["torch"],
        minutes=diffusion[-1]["seconds"] / 60,
        diffusion_steps=diffusion[-1]["step"],
        steps=judged["steps"],
        guidance=judged["guidance"],
        history="".join(f", after {_slice(folder)}" for folder in earlier),
        seen=judged["clips"]["train"],
        heldout=judged["clips"]["heldout"],
        rows="\n".join(rows),
    )


def _slice(run: Path) -> str:
    """What an earlier run trained, in words."""
    steps = [row for row in read_jsonl(run / "log.jsonl") if row["stage"] == "diffusion" and "step" in row]
    config, last = read_json(run / "config.json"), steps[-1]
    return f"{config['vae_minutes']} and {last['seconds'] / 60:.1f} min ({last['step']} steps of {config['batch']})"


def _drop_paths(folder: Path) -> None:
    """Take the folder that the weights were loaded from out of the saved configs."""
    for file in folder.glob("*.json"):
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
        write_text(file, "".join(line for line in lines if '"_name_or_path"' not in line))
