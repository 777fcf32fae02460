"""How good the teacher is: its own samples, read back by the exact judge."""

import csv
import io
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from .. import shapes
from ..files import write_atomic, write_text

SEEN_SEED, HELDOUT_SEED = 700_000, 800_000
SEEN, HELDOUT = 200, 100


def captions_for(split: str, n: int) -> list[str]:
    """The fixed captions of an evaluation: `n` of seen ("train") or of held-out combinations."""
    seed = SEEN_SEED if split == "train" else HELDOUT_SEED
    return [clip.caption for clip in shapes.render(n, seed=seed, split=split)]  # type: ignore[arg-type]


def sample(
    pipe: Any, captions: Sequence[str], *, guidance: float, steps: int, batch: int, first_seed: int = 0
) -> list[NDArray[np.uint8]]:
    """One clip per caption through the stock pipeline; clip i has seed `first_seed` + i, whatever the batch."""
    clips: list[NDArray[np.uint8]] = []
    pipe.set_progress_bar_config(disable=True)
    for start in range(0, len(captions), batch):
        part = list(captions[start : start + batch])
        frames = pipe(
            part,
            num_frames=shapes.FRAMES,
            height=shapes.HEIGHT,
            width=shapes.WIDTH,
            guidance_scale=guidance,
            num_inference_steps=steps,
            generator=[torch.Generator("cpu").manual_seed(first_seed + start + i) for i in range(len(part))],
            output_type="np",
        ).frames
        clips += [(np.clip(clip, 0, 1) * 255).round().astype(np.uint8) for clip in frames]
    return clips


def judge_all(
    clips: Sequence[NDArray[np.uint8]], captions: Sequence[str], *, processes: int = 1
) -> list[dict[str, float]]:
    """Scores of each clip against its caption."""
    if processes == 1:
        return [shapes.judge(clip, caption) for clip, caption in zip(clips, captions, strict=True)]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(shapes.judge, clips, captions, chunksize=8))


def means(scores: Iterable[dict[str, float]]) -> dict[str, float]:
    """The mean of each dimension over the clips that it applies to."""
    rows = list(scores)
    names = sorted({name for row in rows for name in row})
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def write_scores(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of scores as CSV; a dimension that does not apply is left empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_text(path, text.getvalue())


def contact_sheet(path: Path, clips: Sequence[NDArray[np.uint8]], captions: Sequence[str], *, frames: int = 8) -> None:
    """A PNG with one row per clip: its caption, and `frames` frames at equal distances under it."""
    scale, gap, text = 2, 4, 18
    height, width = clips[0].shape[1] * scale, clips[0].shape[2] * scale
    sheet = Image.new("RGB", (frames * (width + gap) + gap, len(clips) * (height + text + gap) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for row, (clip, caption) in enumerate(zip(clips, captions, strict=True)):
        top = gap + row * (height + text + gap)
        draw.text((gap, top + 3), caption, fill="black")
        for column, index in enumerate(np.linspace(0, len(clip) - 1, frames).round().astype(int)):
            image = Image.fromarray(clip[index]).resize((width, height), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + column * (width + gap), top + text))
    with write_atomic(path) as temporary:
        sheet.save(temporary, format="PNG")


def evaluate_teacher(
    pipe: Any, folder: Path, *, guidance: float, steps: int, batch: int, processes: int = 1, scale: float = 1.0
) -> dict[str, dict[str, float]]:
    """Sample and judge both sets; write `scores.csv` (one row per clip) and `samples.png`; return the means per set.

    `scale` shrinks the sets for a trial. Sampled batches are kept in `folder/clips`; a second call goes on from there.
    """
    rows: list[dict[str, Any]] = []
    result = {}
    shown: list[tuple[NDArray[np.uint8], str]] = []
    for split, n in (("train", SEEN), ("heldout", HELDOUT)):
        captions = captions_for(split, max(1, round(n * scale)))
        clips: list[NDArray[np.uint8]] = []
        for start in range(0, len(captions), batch):
            kept = folder / "clips" / f"{split}-{start}-{batch}-{guidance}-{steps}.npy"
            if not kept.exists():
                part = captions[start : start + batch]
                made = sample(pipe, part, guidance=guidance, steps=steps, batch=batch, first_seed=start)
                with write_atomic(kept) as temporary, temporary.open("wb") as file:
                    np.save(file, np.stack(made))
            clips += list(np.load(kept))
            print(f"{split}: {len(clips)} of {len(captions)} clips", flush=True)
        scores = judge_all(clips, captions, processes=processes)
        rows += [
            {"split": split, "seed": i, "caption": caption, **score}
            for i, (caption, score) in enumerate(zip(captions, scores, strict=True))
        ]
        result[split] = means(scores)
        shown += list(zip(clips, captions, strict=True))[: 12 if split == "train" else 6]
    write_scores(folder / "scores.csv", rows)
    contact_sheet(folder / "samples.png", [clip for clip, _ in shown], [caption for _, caption in shown])
    return result
