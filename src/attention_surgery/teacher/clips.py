"""Training clips: rendered by many processes into one array on disk."""

import json
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import shapes
from ..files import write_json

PART = 500
"""Clips that one task renders. Part i comes from seed + i, so that the clips do not depend on the processes."""


def render_clips(folder: Path, n: int, *, seed: int) -> tuple[Tensor, list[str]]:
    """Render `n` training clips, or read them back: uint8 frames (n, f, h, w, 3) mapped from disk, and captions."""
    frames_file, captions_file = folder / "clips.npy", folder / "captions.json"
    if not captions_file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shape = (n, shapes.FRAMES, shapes.HEIGHT, shapes.WIDTH, 3)
        np.lib.format.open_memmap(frames_file, mode="w+", dtype=np.uint8, shape=shape).flush()
        tasks = [(frames_file, start, min(PART, n - start), seed + start // PART) for start in range(0, n, PART)]
        with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
            captions = [caption for part in pool.map(_render_part, tasks) for caption in part]
        write_json(captions_file, captions)
    frames = np.load(frames_file, mmap_mode="r+")
    return torch.from_numpy(frames), json.loads(captions_file.read_text())


def _render_part(task: tuple[Path, int, int, int]) -> list[str]:
    file, start, count, seed = task
    clips = shapes.render(count, seed=seed)
    array = np.load(file, mmap_mode="r+")
    array[start : start + count] = np.stack([clip.frames for clip in clips])
    array.flush()
    return [clip.caption for clip in clips]


def to_unit(frames: Tensor) -> Tensor:
    """uint8 frames (b f h w 3) to what Wan's autoencoder takes: float (b 3 f h w) in [-1, 1]."""
    return frames.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
