"""Putting a trained teacher into the package, with a card that says what the run really did."""

import re
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

{scores}

Every clip's scores: `benchmarks/results/teacher_scores.csv`.

![samples](samples.png)

Made by `python -m attention_surgery.teacher train`, `evaluate` and `install`. The captions and clips are procedural
(`attention_surgery.shapes`); nothing was downloaded.
"""

SCORES = """Scores of the exact judge (`attention_surgery.shapes.judge`) on the teacher's own samples, in %
({steps} steps, guidance {guidance}, fixed seeds; {device}, torch {torch}):

| | {seen} seen combinations | {heldout} held-out combinations |
|---|---|---|
{rows}"""


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


def install_scores(evaluation: Path, *, target: Path = EMBEDDED, results: Path = Path("benchmarks/results")) -> None:
    """Put another evaluation of the pipeline that is there into its card, its contact sheet and `results`.

    Raises:
        CheckpointError: the card of `target` has no scores to replace.
    """
    card = (target / "README.md").read_text(encoding="utf-8")
    table = re.compile(r"^Scores of the exact judge .*?\n(?=\nEvery clip's scores)", re.MULTILINE | re.DOTALL)
    replaced, count = table.subn(lambda _: score_table(evaluation) + "\n", card)
    if count != 1:
        raise CheckpointError(f"{target / 'README.md'} holds {count} tables of scores; expected one")
    write_text(target / "README.md", replaced)
    shutil.copy(evaluation / "samples.png", target / "samples.png")
    shutil.copy(evaluation / "scores.csv", results / "teacher_scores.csv")


def model_card(run: Path, evaluation: Path, earlier: Sequence[Path] = ()) -> str:
    """The card of a run, from its log and its evaluation, and the runs whose weights it started from."""
    config, log = read_json(run / "config.json"), read_jsonl(run / "log.jsonl")
    judged = read_json(evaluation / "evaluation.json")
    start = next(row for row in log if row["stage"] == "start")
    diffusion = [row for row in log if row["stage"] == "diffusion" and "step" in row]
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
        scores=score_table(evaluation),
    )


def score_table(evaluation: Path) -> str:
    """The judge's scores of an evaluation, as the card shows them."""
    judged = read_json(evaluation / "evaluation.json")
    seen, heldout = judged["scores"]["train"], judged["scores"]["heldout"]
    rows = [f"| {name.replace('_', ' ')} | {100 * seen[name]:.1f} | {100 * heldout[name]:.1f} |" for name in seen]
    return SCORES.format(
        **{name: judged[name] for name in ("steps", "guidance", "device", "torch")},
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
